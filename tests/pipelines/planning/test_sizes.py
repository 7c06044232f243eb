"""Parameters, memory and arithmetic in closed form, held against torch and against files."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fields import DITS, SHAPES, UVITS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dit.accelerators import ACCELERATORS
from dit.checkpoint import save_checkpoint
from dit.config import MODEL_NAMES, UVIT_NAMES, config_from_dict, named_config
from dit.model import build_model
from dit.samplers import in_dtype
from dit.schedule import TrainingConfig
from dit.train import create_state, train_step
from pipelines.planning.sizes import (
    FLOAT32,
    activation_bytes,
    checkpoint_bytes,
    count_parameters,
    sampling_bytes,
    training_memory,
)
from pipelines.planning.time import LEAST_BLOCK_SECONDS, exchange_seconds, step_seconds, training_flops, update_bytes

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "dit_param_counts.json"
SMALL = {"input_size": 16, "hidden_size": 96, "depth": 6, "num_heads": 4, "num_classes": 10}


@settings(max_examples=40, deadline=None)
@given(fields=st.fixed_dictionaries(SHAPES | DITS) | st.fixed_dictionaries(SHAPES | UVITS))
def test_parameters_are_as_many_as_the_network_has(fields):
    config = config_from_dict(fields)
    network, counts = build_model(config), count_parameters(config)
    assert counts.trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert counts.total == sum(p.numel() for p in network.parameters())
    blocks = [module for modules in network.modules() if isinstance(modules, torch.nn.ModuleList) for module in modules]
    assert counts.block == max(sum(p.numel() for p in block.parameters()) for block in blocks)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameters_of_the_twelve_models_equal_the_references(name):
    counts, expected = count_parameters(named_config(name)), json.loads(GOLDEN.read_text())[name]
    assert (counts.total, counts.trained) == (expected["total_with_pos_embed"], expected["trainable"])


def saved_bytes(network, config, images, dtype):
    """Storages that torch keeps for backward, but for the network's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its place is taken by another
        return tensor

    x, zero = torch.randn(images, config.in_channels, *config.latent_size), torch.zeros(images, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        network(x, zero, zero)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"conditioning": "adaln"},
        {"conditioning": "cross_attention"},
        {"conditioning": "in_context"},
        {"conditioning": "cross_attention", "norm": "rms"},
        {"mlp": "swiglu"},
        {"qk_norm": True},
        {"position": "rope"},
        {"norm": "rms"},
        {"architecture": "uvit"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "paper",
)
def test_activations_are_what_torch_keeps_for_backward(fields, dtype):
    config = config_from_dict(SMALL | fields)
    network = build_model(config)
    per_image = (saved_bytes(network, config, 4, dtype) - saved_bytes(network, config, 2, dtype)) / 2
    assert activation_bytes(config, dtype) == pytest.approx(per_image, rel=0.06)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once."""

    def __init__(self):
        super().__init__()
        self.held = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages(args)}
        self.held.update(storage for storage in storages(made) if storage._cdata not in given)  # no views
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.held))
        return made


def storages(values):
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"conditioning": "cross_attention"}, {"architecture": "uvit"}], ids=str)
def test_a_pass_without_gradients_holds_what_is_said_at_most(fields, dtype):
    config = config_from_dict(SMALL | fields)
    model = in_dtype(build_model(config).eval(), dtype)

    def peak(images):
        x, zero = torch.randn(images, config.in_channels, *config.latent_size), torch.zeros(images, dtype=torch.long)
        with torch.no_grad(), PeakBytes() as bytes_held:
            model(x, zero, zero)
        return bytes_held.peak

    per_image = (peak(8) - peak(4)) / 4
    assert 0.75 < per_image / sampling_bytes(config, dtype) < 1.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_keeps_the_blocks_inputs_and_one_block(dtype):
    whole, spared = (config_from_dict(SMALL | {"gradient_checkpointing": on}) for on in (False, True))
    network = build_model(spared)
    inputs = (saved_bytes(network, spared, 4, dtype) - saved_bytes(network, spared, 2, dtype)) / 2
    one_block = (activation_bytes(whole, dtype) - activation_bytes(spared, dtype)) / (whole.depth - 1)
    assert activation_bytes(spared, dtype) == pytest.approx(inputs + one_block, rel=0.06)


def test_a_training_state_takes_the_bytes_of_its_tensors():
    config, settings = config_from_dict(SMALL), TrainingConfig(steps=1, ema_sigma_rels=(0.05,))
    state = trained(config, settings)
    memory = training_memory(config, settings, images=4)
    parameters = list(state.network.parameters())
    moments = [m for tensors in state.optimizer.state.values() for m in tensors.values() if m.ndim]
    averages = [tensor for average in state.averages.values() for tensor in average.state_dict().values()]
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.nbytes for p in parameters if p.requires_grad)
    assert memory.moments == sum(m.nbytes for m in moments)
    assert memory.averages == sum(tensor.nbytes for tensor in averages)
    assert (memory.gathered, memory.activations) == (0, 4 * activation_bytes(config))


def test_fsdp_divides_the_state_and_gathers_blocks():
    config, settings = named_config("DiT-XL/2"), TrainingConfig()
    whole, shared = (training_memory(config, settings, images=1, shards=shards) for shards in (1, 8))
    assert sum(shared[:4]) == sum(whole[:4]) / 8
    assert 3 * FLOAT32 * count_parameters(config).block < shared.gathered < 0.2 * whole.weights
    assert shared.activations == whole.activations


def trained(config, settings):
    """A state after one step."""
    state = create_state(build_model(config), settings)
    x, zero = torch.randn(2, config.in_channels, *config.latent_size), torch.zeros(2, dtype=torch.long)
    train_step(state, x, lambda network, x: {"loss": network(x, zero, zero).square().mean()}, settings)
    return state


@pytest.mark.parametrize("further", [(), (0.05, 0.1)])
def test_a_checkpoint_takes_the_bytes_of_its_tensors(tmp_path, further):
    config, settings = config_from_dict(SMALL), TrainingConfig(steps=1, ema_sigma_rels=further)
    checkpoint = save_checkpoint(trained(config, settings), tmp_path / "step_0000001", {}, {})
    files = list(checkpoint.path.rglob("*.safetensors"))
    headers = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    tensors = sum(file.stat().st_size for file in files) - sum(headers)
    steps = FLOAT32 * sum(p.requires_grad for p in build_model(config).parameters())  # AdamW counts for each
    assert tensors == checkpoint_bytes(count_parameters(config), settings) + steps
    everything = sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file())
    assert everything - tensors < 100_000


@pytest.mark.parametrize("fields", [{}, {"conditioning": "cross_attention"}, {"architecture": "uvit"}])
def test_a_training_step_is_three_forward_passes(fields):
    config = config_from_dict(SMALL | fields)
    network = build_model(config)
    x, zero = torch.zeros(2, config.in_channels, *config.latent_size), torch.zeros(2, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, zero, zero).sum().backward()
    # No gradient of the first layers' inputs is computed, of which there is a third for patches and timesteps.
    assert 0.98 * 2 * training_flops(config) < counter.get_total_flops() <= 2 * training_flops(config)


def test_the_largest_step_of_the_paper_is_counted_in_real_flops():
    assert training_flops(named_config("DiT-XL/2")) == pytest.approx(0.712e12, rel=0.001)


def test_a_step_on_one_device_is_arithmetic_and_update():
    config, settings, h100 = named_config("DiT-S/2"), TrainingConfig(), ACCELERATORS["H100"]
    step = step_seconds(config, settings, h100, flops_per_second=1e14, workers=1, workers_per_node=8)
    assert step.forward + step.backward == pytest.approx(256 * training_flops(config) / 1e14)
    assert (step.exchange, step.update) == (0, update_bytes(config, settings) / h100.memory_bandwidth)
    assert step.total == sum(step)


def test_more_workers_take_less_arithmetic_and_as_much_exchange():
    config, settings, h100 = named_config("DiT-XL/2"), TrainingConfig(), ACCELERATORS["H100"]

    def step(workers, strategy="ddp"):
        rate = {"flops_per_second": 3e14, "workers": workers, "workers_per_node": 8}
        return step_seconds(config, settings, h100, **rate, strategy=strategy)

    assert step(64).forward == step(8).forward / 8
    assert step(8).exchange < step(64).exchange < 8 / 7 * step(8).exchange
    assert step(64).total > step(8).total / 8
    assert step(8, "fsdp").exchange == pytest.approx(1.5 * step(8).exchange)
    assert step(8, "fsdp").update == step(8).update / 8


def test_a_step_of_few_images_takes_as_long_as_its_launches():
    config, settings, h100 = named_config("DiT-S/2"), TrainingConfig(), ACCELERATORS["H100"]
    few, fewer = (
        step_seconds(config, settings, h100, flops_per_second=3e14, workers=workers, workers_per_node=8)
        for workers in (128, 256)
    )
    assert few.forward == fewer.forward == config.depth * LEAST_BLOCK_SECONDS


def test_nodes_exchange_over_their_network_where_that_is_slower():
    config, l4 = named_config("DiT-S/2"), ACCELERATORS["L4"]._replace(network=0.1e9)
    moved = 2 * 15 / 16 * FLOAT32 * count_parameters(config).trained
    assert exchange_seconds(config, l4, 16, 8, "ddp") == pytest.approx(moved / 0.8e9)


def test_recomputing_costs_a_third_more():
    config, settings, h100 = named_config("DiT-XL/2"), TrainingConfig(), ACCELERATORS["H100"]
    plain, again = (
        step_seconds(
            config_from_dict(vars(config) | {"gradient_checkpointing": on}),
            settings,
            h100,
            flops_per_second=3e14,
            workers=1,
            workers_per_node=1,
        )
        for on in (False, True)
    )
    assert again.forward + again.backward == pytest.approx(4 / 3 * (plain.forward + plain.backward))


@pytest.mark.parametrize("name", UVIT_NAMES)
def test_uvits_have_parameters_near_their_papers(name):
    published = {"S": 44, "S-Deep": 58, "M": 131, "L": 287, "H": 501}  # Bao et al. 2022, table 1, in millions
    size = name.removeprefix("U-ViT-").split("/")[0]
    assert count_parameters(named_config(name)).total / 1e6 == pytest.approx(published[size], rel=0.03)
