"""Closed forms of parameters, activations and checkpoints against what torch counts and what files hold."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fields import DITS, SHAPES, SMALL, UVITS, WIDE_HEADS
from saved_tensors import saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit.checkpoint import save_checkpoint
from dit.config import MODEL_NAMES, UVIT_NAMES, config_from_dict, named_config
from dit.model import build_model
from dit.precision import in_dtype
from dit.schedule import TrainingConfig
from dit.train import create_state, train_step
from pipelines.planning.activations import activation_bytes
from pipelines.planning.memory import sampling_bytes
from pipelines.planning.networks import FLOAT32, checkpoint_bytes, count_parameters

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "dit_param_counts.json"


@settings(max_examples=40, deadline=None)
@given(fields=st.one_of(st.fixed_dictionaries(SHAPES | kind) for kind in (DITS, WIDE_HEADS, UVITS)))
def test_the_closed_form_counts_the_networks_parameters(fields):
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
        {"head_width": 256, "head_depth": 2},
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
    """Peak of the bytes that tensors created in this context hold at once."""

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
@pytest.mark.parametrize(
    "fields",
    [{}, {"conditioning": "cross_attention"}, {"head_width": 256, "head_depth": 2}, {"architecture": "uvit"}],
    ids=str,
)
def test_the_peak_of_a_pass_without_gradients_is_near_the_closed_form(fields, dtype):
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
def test_gradient_checkpointing_keeps_the_blocks_inputs_and_one_block(dtype):
    whole, spared = (config_from_dict(SMALL | {"gradient_checkpointing": on}) for on in (False, True))
    network = build_model(spared)
    inputs = (saved_bytes(network, spared, 4, dtype) - saved_bytes(network, spared, 2, dtype)) / 2
    one_block = (activation_bytes(whole, dtype) - activation_bytes(spared, dtype)) / (whole.depth - 1)
    assert activation_bytes(spared, dtype) == pytest.approx(inputs + one_block, rel=0.06)


def trained(config, settings):
    """Return a training state after one step."""
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
    assert tensors == checkpoint_bytes(config, settings) + steps
    everything = sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file())
    assert everything - tensors < 100_000


@pytest.mark.parametrize("name", UVIT_NAMES)
def test_uvits_have_parameters_near_their_papers(name):
    published = {"S": 44, "S-Deep": 58, "M": 131, "L": 287, "H": 501}  # Bao et al. 2022, table 1, in millions
    size = name.removeprefix("U-ViT-").split("/")[0]
    assert count_parameters(named_config(name)).total / 1e6 == pytest.approx(published[size], rel=0.03)
