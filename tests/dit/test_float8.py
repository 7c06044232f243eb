"""Float8 products: which layers compute so, their arithmetic and its effect on training, on CPUs by emulation."""

import copy
import dataclasses
import sys
from statistics import fmean

import pytest
import torch
import torch.distributed as distributed
from compile_counter import CompileCounter

from dit.checkpoint import load_checkpoint, restore, save_checkpoint
from dit.config import DiTConfig, UViTConfig, named_config
from dit.distributed import gather_full_tensor, replicate_network, shard_network
from dit.float8 import (
    block_tokens,
    float8_layers,
    missing_float8,
    require_float8,
    require_float8_shapes,
    require_torchao,
    use_float8,
)
from dit.flow import FlowMatching
from dit.macs import forward_macs
from dit.model import DiT, build_model
from dit.precision import network_precision
from dit.schedule import TrainingConfig
from dit.snapshot import take_snapshot
from dit.train import create_state, train_step
from raydit.errors import InvalidInput

MODEL = DiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=10)
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.fixture
def torchao():
    pytest.importorskip("torchao", reason="needs torchao, of the extra fp8")


def emulated(network):
    use_float8(network, emulate=True)
    return network


def awake(network):
    """Return the network with weights everywhere: gates that are zero would hide the blocks."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def rounded(x, dtype):
    """Return what a tensor is in float8, by the definition: its largest magnitude becomes the format's."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().double()
    return ((x * scale.float()).clamp(-largest, largest).to(dtype).double() / scale).float()


def inputs(size=4):
    return torch.randn(size, 4, 8, 8), torch.rand(size), torch.arange(size) % 10


def gradients(network, batch):
    network(*batch).square().mean().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_layers_of_a_dit_are_the_products_of_its_tokens(conditioning, mlp):
    config = DiTConfig(input_size=8, hidden_size=48, depth=2, num_heads=2, conditioning=conditioning, mlp=mlp)
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    parts += ["cross_attn.q", "cross_attn.proj"] * (conditioning == "cross_attention")
    expected = {f"blocks.{index}.{part}" for index in range(2) for part in parts}
    assert float8_layers(DiT(config)).keys() == expected


def test_layers_of_a_u_vit_are_those_of_all_blocks():
    network = build_model(UViTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2))
    plain = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    expected = {f"{block}.{part}" for block in ("in_blocks.0", "mid_block", "out_blocks.0") for part in plain}
    assert float8_layers(network).keys() == expected | {"out_blocks.0.skip_linear"}


def test_nearly_all_flops_of_linear_layers_are_in_float8():
    config = named_config("DiT-XL/2")
    with torch.device("meta"):
        layers = float8_layers(DiT(config))
    macs = config.num_tokens * sum(layer.weight.numel() for layer in layers.values())
    attention = config.depth * 2 * config.num_tokens**2 * config.hidden_size
    assert 0.997 < macs / (forward_macs(config) - attention) < 0.999


def test_a_layer_rounds_every_operand_of_its_three_products(torchao):
    network = DiT(MODEL)
    plain = copy.deepcopy(network.blocks[0].mlp.fc1)
    layer = emulated(network).blocks[0].mlp.fc1
    x = torch.randn(3, 16, 64, requires_grad=True)
    y, upstream = layer(x), torch.randn(3, 16, 256)
    y.backward(upstream)
    values, weights = rounded(x.detach(), FORMATS["e4m3"]), rounded(plain.weight.detach(), FORMATS["e4m3"])
    upstream_rounded = rounded(upstream, FORMATS["e5m2"])
    torch.testing.assert_close(y, values @ weights.T + plain.bias)
    torch.testing.assert_close(x.grad, upstream_rounded @ weights)
    by_token = upstream_rounded.flatten(0, 1).T @ values.flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, by_token, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))


def test_parameters_stay_the_same_objects_in_float32_under_the_same_names(torchao):
    network = DiT(MODEL)
    before, state = dict(network.named_parameters()), list(network.state_dict())
    after = dict(emulated(network).named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(network.state_dict()) == state
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(torchao):
    plain = awake(emulated(DiT(MODEL)))
    saving = emulated(DiT(dataclasses.replace(MODEL, gradient_checkpointing=True)))
    saving.load_state_dict(plain.state_dict())
    batch = inputs()
    expected = gradients(plain, batch)
    torch.testing.assert_close(gradients(saving, batch), expected, rtol=0, atol=0)


def test_one_compiled_block_serves_all(torchao):
    torch.compiler.reset()
    counter, plain = CompileCounter(), awake(emulated(DiT(MODEL)))
    compiled, batch = counter.compile(copy.deepcopy(plain)), inputs()
    torch.testing.assert_close(gradients(compiled, batch), gradients(plain, batch), rtol=1e-4, atol=1e-5)
    assert (counter.forward, counter.backward) == (1, 1)
    torch.compiler.reset()


SMALLER = dataclasses.replace(MODEL, input_size=4)


@pytest.mark.slow  # imports FSDP2
@pytest.mark.parametrize("wrap", [shard_network, lambda network: replicate_network(network, torch.device("cpu"))])
def test_data_parallel_training_computes_the_same(torchao, tmp_path, wrap):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    torch.compiler.reset()
    try:
        plain, batch = awake(emulated(DiT(MODEL))), inputs()
        network = copy.deepcopy(plain)
        counter = CompileCounter()
        wrapped = wrap(counter.compile(network))
        wrapped(*batch).square().mean().backward()
        found = {name: gather_full_tensor(p.grad) for name, p in network.named_parameters() if p.grad is not None}
        torch.testing.assert_close(found, gradients(plain, batch), rtol=1e-4, atol=1e-5)
        assert (counter.forward, counter.backward) == (1, 1)
    finally:
        distributed.destroy_process_group()


def learn(seed, steps, convert=lambda network: network):
    """Train on noised patterns, one for each of four labels; return the losses and the state."""
    torch.manual_seed(seed)
    config = TrainingConfig(steps=steps, global_batch_size=32, learning_rate=1e-2, betas=(0.9, 0.99), grad_clip=1.0)
    state = create_state(convert(DiT(SMALLER)), config)
    process, generator = FlowMatching(), torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(99))

    def losses(model, batch):
        def forward(x, t, y):
            with network_precision("cpu", "bfloat16"):
                return model(x, t, y).float()

        return {"loss": process.training_losses(forward, *batch)["loss"].mean()}

    measured = []
    for _ in range(steps):
        labels = torch.randint(0, 4, (32,), generator=generator)
        noise, t = torch.randn(32, 4, 4, 4, generator=generator), torch.rand(32, generator=generator)
        measured.append(float(train_step(state, (patterns[labels], t, labels, noise), losses, config)["loss"]))
    return measured, state


def test_the_loss_is_that_of_bfloat16_within_its_noise(torchao):
    """The noise is the difference between two seeds."""

    def last_third(seed, *convert):
        return fmean(learn(seed, 40, *convert)[0][-15:])

    exact = [last_third(seed) for seed in (0, 1)]
    in_float8 = [last_third(seed, emulated) for seed in (0, 1)]
    untrained = learn(0, 1)[0][0]
    assert in_float8 != exact and max(exact + in_float8) < 0.5 * untrained
    assert abs(fmean(in_float8) - fmean(exact)) < abs(exact[0] - exact[1]) < 0.1 * untrained


def test_a_checkpoint_of_float8_opens_without_it(torchao, tmp_path):
    _, state = learn(0, 3, emulated)
    save_checkpoint(take_snapshot(state), tmp_path / "step", {}, {})
    plain = create_state(DiT(SMALLER), TrainingConfig(steps=3, global_batch_size=32))
    restore(plain, load_checkpoint(tmp_path / "step"))
    torch.testing.assert_close(plain.network.state_dict(), state.network.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(plain.ema.state_dict(), state.ema.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"hidden_size": 36}, "hidden_size = 36"),
        ({"hidden_size": 48, "mlp_ratio": 3.5}, "mlp_size = 168"),
    ],
)
def test_widths_that_do_not_fit_are_refused(fields, found):
    with pytest.raises(InvalidInput, match=f"{found}, expected a multiple of 16.*Change the model's widths"):
        require_float8_shapes(DiTConfig(input_size=8, depth=2, num_heads=2, **fields))
    require_float8_shapes(MODEL)
    require_float8_shapes(named_config("DiT-XL/2"))


@pytest.mark.parametrize(
    ("capability", "is_missing"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)]
)
def test_cards_before_ada_are_refused(monkeypatch, capability, is_missing):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    reason = missing_float8(torch.device("cuda"))
    assert reason == (f"this card has compute capability {capability[0]}.{capability[1]}" if is_missing else None)


def test_a_cpu_is_refused():
    with pytest.raises(InvalidInput, match="this worker computes on the CPU, expected an NVIDIA GPU.*accelerator_type"):
        require_float8(torch.device("cpu"))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InvalidInput, match=r"without the package torchao.*pip install 'raydit\[fp8\]'"):
        require_torchao()


def test_only_sequences_that_are_not_aligned_are_padded():
    assert block_tokens(named_config("DiT-XL/2")) == 256
    assert block_tokens(DiTConfig(input_size=8, conditioning="in_context")) == 18
    assert block_tokens(UViTConfig(input_size=8)) == 18
