"""Conditions: joining, splitting, dropping; and class models that take them instead of labels."""

import copy
from dataclasses import replace

import pytest
import torch

from dit.conditions import Conditions, as_conditions
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from dit.schedule import TrainingConfig
from dit.train import create_state, train_step
from raydit.errors import InvalidInput

NULL_TEXT = Conditions(
    text=torch.full((1, 2, 3), 9.0), text_mask=torch.tensor([[True, False]]), pooled=torch.ones(1, 4)
)


def conditions(count=5, length=3):
    """Conditions with all fields, no two rows of which are equal."""
    return Conditions(
        labels=torch.arange(count),
        text=torch.randn(count, length, 3),
        text_mask=torch.rand(count, length) < 0.5,
        pooled=torch.randn(count, 4),
        size=torch.randn(count, 2),
        guidance=torch.randn(count),
    )


def assert_equal(first, second):
    assert first.given().keys() == second.given().keys()
    for name, tensor in first.given().items():
        assert torch.equal(tensor, second.given()[name]), name


def rows(given, index):
    return Conditions(**{name: tensor[index] for name, tensor in given.given().items()})


def test_unequal_texts_are_padded_with_tokens_that_the_mask_leaves_out():
    short, long = (Conditions(text=torch.ones(1, n, 2), text_mask=torch.ones(1, n, dtype=torch.bool)) for n in (1, 3))
    joined = Conditions.cat([short, long])
    assert joined.text.tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1], [1, 1], [1, 1]]]
    assert joined.text_mask.tolist() == [[True, False, False], [True, True, True]]
    assert short.text.shape == (1, 1, 2), "the batches that are joined stay as they are"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_chunks_are_those_of_tensors_and_join_again(count):
    given = conditions()
    chunks = given.chunk(count)
    assert [len(chunk) for chunk in chunks] == [len(chunk) for chunk in torch.arange(5).chunk(count)]
    assert_equal(Conditions.cat(chunks), given)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_parts_are_as_many_as_asked_for_and_join_again(count):
    given = conditions()
    parts = given.tensor_split(count)
    assert [len(part) for part in parts] == [len(part) for part in torch.arange(5).tensor_split(count)]
    assert_equal(Conditions.cat(parts), given)
    assert [part.given() for part in Conditions().tensor_split(count)] == [{}] * count


def test_repeated_conditions_are_in_the_order_of_a_joined_batch():
    given = conditions()
    assert_equal(given.repeat(3), Conditions.cat([given] * 3))


def test_null_conditions_are_of_no_class_and_no_text_and_keep_the_size():
    given = conditions()
    null = given.null(NULL_TEXT, null_class=7)
    assert null.labels.tolist() == [7] * 5
    assert null.text.shape == (5, 2, 3) and (null.text == 9).all()
    assert null.text_mask.tolist() == [[True, False]] * 5
    assert null.pooled.shape == (5, 4) and (null.pooled == 1).all()
    assert torch.equal(null.size, given.size) and torch.equal(null.guidance, given.guidance)
    assert given.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("one_row", [False, True])
def test_all_conditions_of_a_dropped_image_are_replaced_and_none_of_another(one_row):
    given = replace(conditions(), size=None, guidance=None)
    null = (rows(given, slice(1)) if one_row else given).null(NULL_TEXT, null_class=7)
    dropped = torch.tensor([True, False, False, True, False])
    result = given.drop(dropped, null)
    text = Conditions(text=NULL_TEXT.text, text_mask=NULL_TEXT.text_mask)
    longer = Conditions.cat([text, replace(given, labels=None, pooled=None)])  # the null text, in the texts' length
    for index, is_dropped in enumerate(dropped):
        assert result.labels[index] == (7 if is_dropped else index)
        expected = longer.text[0 if is_dropped else index + 1], longer.text_mask[0 if is_dropped else index + 1]
        assert torch.equal(result.text[index], expected[0]) and torch.equal(result.text_mask[index], expected[1])
        assert torch.equal(result.pooled[index], torch.ones(4) if is_dropped else given.pooled[index])


def test_labels_are_conditions_and_conditions_stay_what_they_are():
    labels, given = torch.tensor([1, 2]), conditions()
    assert as_conditions(labels).labels is labels and as_conditions(given) is given
    assert as_conditions(None).given() == {} and len(as_conditions(None)) == 0 and len(given) == 5


def test_conditions_move_to_a_device_with_all_their_fields():
    moved = conditions().to("meta")
    assert {tensor.device.type for tensor in moved.given().values()} == {"meta"} and len(moved.given()) == 6


MASKED = {"text": torch.zeros(2, 4, 3), "text_mask": torch.ones(2, 4, dtype=torch.bool)}
LABELS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("make", "found", "expected"),
    [
        (lambda: Conditions(torch.zeros(2, 1)), "labels of shape (2, 1)", "1 dimensions"),
        (lambda: Conditions(LABELS, guidance=torch.ones(3)), "labels of 2 images, guidance of 3 images", "same number"),
        (lambda: Conditions(text=MASKED["text"]), "only one of text and text_mask", "both or neither"),
        (
            lambda: Conditions(text=torch.zeros(2, 5, 3), text_mask=MASKED["text_mask"]),
            "text of shape (2, 5, 3) with text_mask of shape (2, 4)",
            "(N, L, D) with (N, L)",
        ),
        (
            lambda: Conditions.cat([Conditions(LABELS), Conditions(**MASKED)]),
            "conditions with labels beside conditions with text of width 3, text_mask",
            "the same fields",
        ),
        (
            lambda: Conditions.cat([Conditions(size=torch.ones(1, 3)), Conditions(size=torch.ones(1, 6))]),
            "size of width 3 beside conditions with size of width 6",
            "of the same widths",
        ),
        (lambda: Conditions(LABELS).drop(LABELS > 1, Conditions()), "labels beside conditions with no fields", "same"),
        (lambda: Conditions(LABELS).null(), "labels without a null class", "null_class"),
        (lambda: Conditions(**MASKED).null(null_class=3), "a null text without text, text_mask", "the empty text"),
        (
            lambda: conditions().null(replace(NULL_TEXT, pooled=None), null_class=3),
            "a null text without pooled",
            "the empty text",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(make, found, expected):
    with pytest.raises(InvalidInput) as error:
        make()
    assert f"{found}" in str(error.value) and expected in str(error.value)


architectures = pytest.mark.parametrize("architecture", ["dit", "uvit"])


def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), LABELS


@architectures
def test_a_class_model_gives_the_same_for_conditions_as_for_labels(architecture, small_model):
    model = small_model(architecture=architecture)
    x, t, y = inputs()
    assert torch.equal(model(x, t, Conditions(y)), model(x, t, y))


def test_conditions_compile_into_one_graph(small_model):
    model = small_model(depth=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, t, y = inputs()
    assert torch.equal(compiled(x, t, Conditions(y)), model(x, t, y))
    with torch.compiler.set_stance("fail_on_recompile"):  # every batch is another object
        assert torch.equal(compiled(x, t, Conditions(y.flip(0))), model(x, t, y.flip(0)))


@architectures
@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_class_model_refuses_conditions_that_it_would_ignore(architecture, num_classes, small_model):
    x, t, y = inputs()
    model = small_model(architecture=architecture, num_classes=num_classes)
    with pytest.raises(InvalidInput, match="conditions with text, text_mask for a model of classes, expected labels"):
        model(x, t, Conditions(y, **MASKED))


def test_missing_labels_and_labels_of_another_batch_are_refused(small_model):
    x, t, y = inputs()
    for given, found in ((Conditions(), "labels are missing"), (Conditions(y[:1]), r"labels have shape \(1,\)")):
        with pytest.raises(InvalidInput, match=found):
            small_model()(x, t, given)


@architectures
@pytest.mark.parametrize("process", [FlowMatching(), GaussianDiffusion(variance="fixed_small")])
def test_a_training_step_with_conditions_is_that_with_labels(process, architecture, small_model):
    settings = TrainingConfig(steps=1, global_batch_size=2, learning_rate=1e-2, accumulation_steps=2)
    fields = {"architecture": architecture, **({"learn_sigma": False} if architecture == "dit" else {})}
    latents, noise, y = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), LABELS
    t = process.sample_timesteps(torch.rand(2))

    class Batch:
        def __init__(self, given):
            self.given = given

        def chunk(self, count):
            return [Batch(parts) for parts in zip(*(given.chunk(count) for given in self.given), strict=True)]

    def losses(model, batch):
        return {name: values.sum() / 2 for name, values in process.training_losses(model, *batch.given).items()}

    states = [create_state(copy.deepcopy(small_model(**fields)), settings) for _ in range(2)]
    metrics = [
        train_step(state, Batch((latents, t, given, noise)), losses, settings)
        for state, given in zip(states, (y, Conditions(y)), strict=True)
    ]
    assert metrics[0] == metrics[1]
    start = small_model(**fields).state_dict()
    weights = [state.network.state_dict() for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start)
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
