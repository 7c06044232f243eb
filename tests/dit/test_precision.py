"""The precision of a network: where TF32 is switched on, that it is switched off again, and who does not notice."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dit.hardware.peak_speed import peak_flops
from dit.model import create_model
from dit.precision import (
    backward_in,
    has_tf32,
    in_dtype,
    missing_tf32,
    network_precision,
    require_precision,
    tf32_products,
    weights_dtype,
)
from evaluation.extractors import create_extractor
from raydit.errors import InvalidInput

DTYPES = ("float32", "tf32", "bfloat16")


def flags():
    """torch's switches of TF32, for matrix products and convolutions; torch raises if they contradict each other."""
    products = torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32 == products
    return products, torch.backends.cudnn.allow_tf32


def set_flags(products, convolutions):
    torch.set_float32_matmul_precision("high" if products else "highest")
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture(params=[(False, True), (False, False), (True, True)], ids=["torch", "exact", "all"])
def earlier(request):
    """The switches as somebody may have left them; the first are torch's defaults."""
    before = flags()
    set_flags(*request.param)
    yield request.param
    set_flags(*before)


@pytest.fixture
def ampere(monkeypatch):
    """A device with TF32, as far as the switches are concerned."""
    monkeypatch.setattr("dit.precision.has_tf32", lambda device: True)


@pytest.mark.parametrize("enter", [network_precision, tf32_products])
def test_tf32_is_on_inside_and_as_it_was_outside(earlier, ampere, enter):
    with enter("cpu", "tf32"):
        assert flags() == (True, True)
        with enter("cpu", "tf32"):
            assert flags() == (True, True)
        assert flags() == (True, True)
    assert flags() == earlier
    with pytest.raises(KeyError), enter("cpu", "tf32"):
        raise KeyError
    assert flags() == earlier


def test_the_last_of_several_contexts_restores_the_switches(earlier, ampere):
    """Two requests to a served model, the first of which ends first."""
    first, second = tf32_products("cpu", "tf32"), tf32_products("cpu", "tf32")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert flags() == (True, True)
    second.__exit__(None, None, None)
    assert flags() == earlier


def test_switches_that_are_right_are_not_set(monkeypatch, ampere):
    """torch takes even that for a change, and compiles anew what was compiled before."""
    extractor, changes, change = create_extractor("efficientnet-lite0"), [], torch.set_float32_matmul_precision
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: (changes.append(value), change(value)))
    extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert changes == []
    with network_precision("cpu", "tf32"), network_precision("cpu", "tf32"):
        assert changes == ["high"]
    assert changes == ["high", "highest"]


@pytest.mark.parametrize("enter", [network_precision, tf32_products])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_leave_the_switches_alone(earlier, ampere, enter, dtype):
    with enter("cpu", dtype):
        assert flags() == earlier
        assert torch.is_autocast_enabled("cpu") == (dtype == "bfloat16" and enter is network_precision)
    assert not torch.is_autocast_enabled("cpu")


class Layer(torch.nn.Module):
    """A network's block. torch 2.11 does not trace torch.nn.Linear where that is the compiled module."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


def test_a_compiled_network_is_compiled_once_for_tf32_and_leaves_the_switches_alone(ampere):
    """A call in float32 has another graph, because kernels are chosen by the precision."""
    torch.compiler.reset()
    counter = CompileCounter()
    layer = Layer()
    layer.compile(backend=counter)
    graphs = []
    for dtype in ("tf32", "tf32", "float32", "tf32"):
        with network_precision("cpu", dtype):
            loss = layer(torch.ones(1, 2)).sum()
        backward_in("cpu", dtype, loss)
        assert flags() == (False, True)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]


def test_the_backward_pass_is_in_the_precision_too(ampere):
    seen = []
    weight = torch.ones(2, requires_grad=True)
    loss = weight.sum()
    loss.register_hook(lambda gradient: seen.append(flags()))
    before = flags()
    backward_in("cpu", "tf32", loss)
    assert seen == [(True, True)] and flags() == before
    assert torch.equal(weight.grad, torch.ones(2))


def test_only_the_network_of_a_sampler_sees_tf32(ampere):
    seen = []

    def network(x, t, y):
        seen.append(flags())
        return x

    x = torch.ones(1, 1)
    assert in_dtype(network, "float32") is network
    assert in_dtype(network, "tf32")(x, x, x) is x
    assert seen == [(True, True)] and flags() == (False, True)


def test_an_extractor_stays_exact_under_tf32(ampere):
    extractor = create_extractor("efficientnet-lite0")
    seen = []
    original = torch.nn.functional.conv2d

    def noted(*arguments, **further):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return original(*arguments, **further)

    with pytest.MonkeyPatch.context() as patched, network_precision("cpu", "tf32"):
        patched.setattr(torch.nn.functional, "conv2d", noted)
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        assert flags() == (True, True)
    assert set(seen) == {("highest", False)} and flags() == (False, True)


def test_a_cpu_has_no_tf32_and_is_named():
    assert not has_tf32("cpu")
    assert missing_tf32("tf32", "cpu") == "this CPU"
    assert missing_tf32("float32", "cpu") is missing_tf32("bfloat16", "cpu") is None
    with pytest.raises(InvalidInput, match="evaluate.dtype: found 'tf32', and this CPU has no TF32, expected a GPU"):
        require_precision("evaluate.dtype", "tf32", "cpu")
    for dtype in ("float32", "bfloat16"):
        require_precision("evaluate.dtype", dtype, "cpu")


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_tf32_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert has_tf32("cuda") == expected
    assert missing_tf32("tf32", "cuda") == (None if expected else "this Tesla V100")


def test_on_a_cpu_tf32_is_float32_to_the_bit():
    torch.manual_seed(0)
    model = create_model("DiT-S/2", depth=1, input_size=8, num_classes=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        exact, tf32 = model(x, t, y), in_dtype(model, "tf32")(x, t, y)
    assert exact.abs().sum() > 0 and torch.equal(exact, tf32)


def test_weights_are_stored_in_float32_for_tf32():
    assert [weights_dtype(dtype) for dtype in DTYPES] == [torch.float32, torch.float32, torch.bfloat16]


def test_a_peak_is_known_for_every_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert [peak_flops(torch.device("cuda"), dtype) for dtype in DTYPES] == [67e12, 494e12, 989e12]
    assert peak_flops(torch.device("cpu"), "tf32") > 0


@pytest.mark.gpu
def test_tf32_rounds_a_network_on_a_gpu_and_leaves_the_extractor_exact():
    if not torch.cuda.is_available() or not has_tf32("cuda"):
        pytest.skip("no GPU with TF32")
    torch.manual_seed(0)
    model = create_model("DiT-S/2", depth=2, input_size=16, num_classes=3).cuda().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(8, 4, 16, 16, device="cuda")
    t, y = torch.rand(8, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    with torch.no_grad():
        exact, tf32 = model(x, t, y), in_dtype(model, "tf32")(x, t, y)
        again = model(x, t, y)
    assert torch.equal(exact, again) and not torch.equal(exact, tf32)
    assert (exact - tf32).norm() / exact.norm() < 5e-3
    grads = []
    for dtype in ("float32", "tf32"):
        model.zero_grad()
        with network_precision("cuda", dtype):
            output = model(x, t, y)
        backward_in("cuda", dtype, output.square().mean())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*grads) and (grads[0] - grads[1]).norm() / grads[0].norm() < 2e-2
    extractor = create_extractor("efficientnet-lite0", device="cuda")
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    outside = extractor(images).features
    with network_precision("cuda", "tf32"):
        assert (extractor(images).features == outside).all()
