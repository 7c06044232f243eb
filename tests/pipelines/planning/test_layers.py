"""The layers that a plan counts, against those of the networks themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fields import DITS, SHAPES, UVITS, WIDE_HEADS
from torch import nn

from dit.config import config_from_dict
from dit.lora import adapter_config
from dit.macs import forward_macs
from dit.model import build_model
from pipelines.config.lora import LoraConfig
from pipelines.planning.layers import network_layers
from pipelines.planning.networks import adapter_parameters
from raydit.errors import InvalidInput


@settings(max_examples=40, deadline=None)
@given(fields=st.one_of(st.fixed_dictionaries(SHAPES | kind) for kind in (DITS, WIDE_HEADS, UVITS)))
def test_the_layers_are_those_of_the_network(fields):
    config = config_from_dict(fields)
    with torch.device("meta"):
        network = build_model(config)
    layers = network_layers(config)
    linear = {name: module.weight.shape for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {layer.name: (layer.outputs, layer.inputs) for layer in layers if layer.kind == "linear"} == linear
    assert sum(layer.macs for layer in layers) == forward_macs(config)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] or name for name in trained} <= {layer.name for layer in layers}


BASE = {"input_size": 16, "hidden_size": 96, "depth": 4, "num_heads": 4, "num_classes": 10}
MODELS = [
    {},
    {"conditioning": "adaln", "mlp": "swiglu"},
    {"conditioning": "cross_attention", "qk_norm": True, "norm": "rms"},
    {"conditioning": "in_context"},
    {"head_width": 128, "head_depth": 2},
    {"architecture": "uvit"},
]
TARGETS = [
    ("*",),
    ("*.attn.qkv",),
    ("mlp", "*.attn.qkv"),
    ("attention", "*.attn.qkv"),
    ("*blocks.{0..1}.mlp.*",),
    ("blocks.{2..3}.mlp.fc1", "modulation"),
    ("final_layer.*",),
    ("blocs.*",),
    ("modulation",),
]


@pytest.mark.parametrize("rank", [3, 97])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_an_adapter_is_counted_or_refused_as_training_does(fields, targets, rank):
    config = config_from_dict(BASE | fields)
    with torch.device("meta"):
        network = build_model(config)
    try:
        adapter = adapter_config(network, rank=rank, alpha=1.0, targets=targets)
    except InvalidInput as refused:
        with pytest.raises(InvalidInput) as planned:
            adapter_parameters(config, LoraConfig(rank=rank, targets=targets))
        assert str(planned.value) == str(refused)
    else:
        expected = rank * sum(sum(network.get_submodule(layer).weight.shape) for layer in adapter.layers)
        assert adapter_parameters(config, LoraConfig(rank=rank, targets=targets)) == expected
