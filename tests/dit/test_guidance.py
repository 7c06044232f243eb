import pytest
import torch

from dit.conditions import Conditions
from dit.precision import in_dtype
from dit.samplers import guided
from raydit.errors import InvalidInput


def test_guidance_equals_the_reference(dit_a, golden):
    io = golden("dit_a.io.safetensors")
    x, t, y = (io[name][:4] for name in ("cfg_x", "cfg_t", "cfg_y"))
    for scale in (1.0, 1.5):
        with torch.no_grad():
            ours = guided(dit_a, scale, channels=3)(x, t, y)
        torch.testing.assert_close(ours, io[f"cfg_out_{scale}"][:4], atol=1e-5, rtol=0)


def test_guidance_extrapolates_from_the_null_class(small_model):
    model = small_model()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
    cond, uncond = model(x, t, y), model(x, t, torch.tensor([10, 10]))
    for channels, count in ((None, 4), (3, 3)):
        ours = guided(model, 2.5, channels=channels)(x, t, y)
        expected = uncond + 2.5 * (cond - uncond)
        torch.testing.assert_close(ours[:, :count], expected[:, :count], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours[:, count:], cond[:, count:], atol=1e-5, rtol=1e-5)


def test_no_guidance_is_the_model_itself(small_model):
    model = small_model(class_dropout_prob=0.0)
    assert guided(model, 1.0) is model


def test_guidance_applies_in_its_interval_only(small_model):
    model, sizes = small_model(), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    within = guided(model, 3.0, interval=(100, 500))
    inside, outside, mixed = torch.tensor([100, 500]), torch.tensor([99, 501]), torch.tensor([50, 300])
    torch.testing.assert_close(within(x, inside, y), guided(model, 3.0)(x, inside, y))
    torch.testing.assert_close(within(x, outside, y), model(x, outside, y))
    torch.testing.assert_close(within(x, mixed, y)[:1], model(x[:1], mixed[:1], y[:1]), atol=1e-5, rtol=1e-5)
    assert sizes == [4, 4, 2, 2, 4, 1], "outside the interval the batch must not be doubled"


@pytest.mark.parametrize(
    ("options", "found", "expected", "advice"),
    [
        ({"channels": 0}, "cfg_channels is 0", "1 or more", "Leave it out"),
        ({"interval": (5, 1)}, "cfg_interval is (5, 1)", "(low, high)", "Swap"),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(options, found, expected, advice, small_model):
    with pytest.raises(ValueError) as error:
        guided(small_model(), 2.0, **options)
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)


def test_model_without_null_class_cannot_be_guided(small_model):
    for fields in ({"class_dropout_prob": 0.0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="cfg_scale is 2.0 .* no null class, .*Use cfg_scale 1.0"):
            guided(small_model(**fields), 2.0)


def test_a_model_in_bfloat16_returns_float32_and_is_guided_in_float32(small_model):
    model = small_model()
    rounded = in_dtype(model, "bfloat16")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
    both = torch.cat([x, x]), torch.cat([t, t]), torch.tensor([1, 2, 10, 10])
    answer, exact = rounded(*both), model(*both)
    assert answer.dtype == torch.float32 and torch.equal(answer, answer.bfloat16().float())
    assert 0 < (answer - exact).abs().mean() < 0.02 * exact.abs().mean()
    cond, uncond = answer[:, :4].chunk(2)
    ours = guided(rounded, 4.0)(x, t, y)[:, :4]
    assert torch.equal(ours, uncond + 4.0 * (cond - uncond))
    assert not torch.equal(ours, ours.bfloat16().float())


class ToyModel:
    """A model of labels and text that returns the sum of what it is given, so that guidance can be computed by hand."""

    def __call__(self, x, t, y):
        tokens = (y.text.sum(-1) * y.text_mask).sum(-1)
        return x + (100 * y.labels + tokens).view(-1, 1, 1, 1)


def caption(label, *tokens):
    """Conditions of one image with one number for each token."""
    text = torch.tensor(tokens, dtype=torch.float32).view(1, -1, 1)
    return Conditions(torch.tensor([label]), text=text, text_mask=torch.ones(1, len(tokens), dtype=torch.bool))


@pytest.mark.parametrize(
    ("null", "offsets"),
    [
        (caption(0, 7.0), [7, 7]),  # a negative condition for all images
        (Conditions.cat([caption(3, 1.0), caption(0, 1.0, 1.0, 1.0)]), [301, 3]),  # one for each
    ],
)
def test_guidance_leads_away_from_a_negative_condition(null, offsets):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    y = Conditions.cat([caption(1, 2.0), caption(2, 2.0, 4.0)])
    cond = x + torch.tensor([102.0, 206.0]).view(2, 1, 1, 1)
    uncond = x + torch.tensor(offsets).view(2, 1, 1, 1)
    torch.testing.assert_close(guided(ToyModel(), 2.5, null=null)(x, t, y), uncond + 2.5 * (cond - uncond))
    ours = guided(ToyModel(), 2.5, channels=3, interval=(0, 500), null=null)(x, t, y)
    torch.testing.assert_close(ours[:1, :3], (uncond + 2.5 * (cond - uncond))[:1, :3])
    torch.testing.assert_close((ours[1], ours[0, 3]), (cond[1], cond[0, 3]))


def test_conditions_are_guided_as_labels_are(small_model):
    model = small_model()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
    expected = guided(model, 2.5, channels=3)(x, t, y)
    assert torch.equal(guided(model, 2.5, channels=3)(x, t, Conditions(y)), expected)
    for null in (torch.tensor([10]), torch.tensor([10, 10]), Conditions(torch.tensor([10]))):
        assert torch.equal(guided(model, 2.5, channels=3, null=null)(x, t, y), expected)


def test_a_model_without_null_class_is_guided_away_from_another_class(small_model):
    model = small_model(class_dropout_prob=0.0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
    uncond, cond = model(x, t, torch.tensor([5, 5])), model(x, t, y)
    ours = guided(model, 2.0, channels=4, null=torch.tensor([5]))(x, t, y)
    torch.testing.assert_close(ours[:, :4], (uncond + 2.0 * (cond - uncond))[:, :4], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("null", "found"),
    [
        (torch.tensor([1, 2, 3]), "null conditions of 3 images for a batch of 2, expected those of one image"),
        (Conditions(pooled=torch.ones(1, 4)), "conditions with labels beside conditions with pooled of width 4"),
    ],
)
def test_null_conditions_that_do_not_fit_are_refused(null, found, small_model):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
    with pytest.raises(InvalidInput, match=found):
        guided(small_model(), 2.0, null=null)(x, t, y)
