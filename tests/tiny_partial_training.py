"""Networks of which an adapter, or a part of the parameters, is trained; the adapter's layers need no peft."""

import torch
from torch import nn

from dit.lora import adapter_config
from dit.model import build_model
from dit.trained_parameters import freeze
from pipelines.config.lora import LoraConfig
from pipelines.config.start import StartConfig
from pipelines.config.training import TrainConfig

ALL_BUT_THE_FINAL_LAYER = ("blocks.*", "x_embedder.*", "t_embedder.*", "y_embedder.*")
TRAININGS = {
    "attention": {"targets": ("attention",)},
    "mlp": {"targets": ("mlp",)},
    "all": {"targets": ("attention", "mlp", "modulation")},
    "upper mlp": {"targets": ("blocks.{3..5}.mlp.*",)},
    "every layer": {"targets": ("*",)},
    "first half frozen": {"freeze": ("blocks.{0..2}.*",)},
    "first half and embeddings frozen": {"freeze": ("blocks.{0..2}.*", *ALL_BUT_THE_FINAL_LAYER[1:])},
    "blocks frozen": {"freeze": ("blocks.*",)},
    "final layer": {"freeze": ALL_BUT_THE_FINAL_LAYER},
    "biases": {"freeze": ("*.weight",)},
}


MODELS = [
    {},
    {"conditioning": "adaln", "mlp": "swiglu", "position": "rope"},
    {"conditioning": "cross_attention", "qk_norm": True, "norm": "rms"},
    {"conditioning": "in_context"},
    {"head_width": 128, "head_depth": 2},
]
UVIT = {"architecture": "uvit", "mlp_time_embed": True, "final_conv": True}
UVIT_TRAININGS = [
    {"targets": ("attention", "mlp")},
    {"targets": ("out_blocks.*",)},
    {"freeze": ("in_blocks.*", "patch_embed.*")},
    {"freeze": ("*_block*", "patch_embed.*", "label_emb.*", "pos_embed", "time_embed.*")},
]
CASES = [
    (fields, training)
    for fields in MODELS
    for name, training in TRAININGS.items()
    if name != "all" or fields.get("conditioning") not in ("cross_attention", "in_context")  # without modulation
] + [(UVIT, training) for training in UVIT_TRAININGS]
"""Fields of models beside those of `model_fields.SMALL`, each with a training."""


class LowRank(nn.Module):
    """A frozen linear layer with factors A and B."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def partial_settings(targets=None, freeze=(), rank=4, **fields):
    """Return the settings of a training of an adapter, or of all but some frozen parameters."""
    lora = None if targets is None else LoraConfig(rank=rank, targets=targets)
    return TrainConfig(start=StartConfig(checkpoint="base", freeze=freeze), lora=lora, **fields)


def partial_network(config, settings):
    """Build the network of a training on the CPU."""
    network = build_model(config)
    if settings.lora is None:
        freeze(network, settings.start.freeze)
        return network
    rank = settings.lora.chosen_rank
    layers = adapter_config(network, rank=rank, alpha=1.0, targets=settings.lora.chosen_targets).layers
    network.requires_grad_(False)
    for name in layers:
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, LowRank(network.get_submodule(name), rank))
    return network


def inputs(config, images):
    """Return latents, timesteps and labels of some images."""
    zeros = torch.zeros(images, dtype=torch.long)
    return torch.randn(images, config.in_channels, *config.latent_size), zeros, zeros
