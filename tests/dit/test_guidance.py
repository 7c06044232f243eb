import pytest
import torch

from dit.samplers import guided, in_dtype


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
