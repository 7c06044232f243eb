"""What a training's backward pass computes where an adapter or a part of the parameters is trained.

A layer's products are computed again for the gradient of its weights if these are trained, and for the gradient of its
input if anything is trained before it, on which the input depends. Attention has no weights, and both of its inputs. A
layer with factors A and B has their products as well, forward and for the gradients of both.
"""

import functools
from typing import NamedTuple

from dit.config import DiTConfig, UViTConfig
from dit.macs import forward_macs
from pipelines.config.lora import LoraConfig
from pipelines.config.training import TrainConfig
from pipelines.planning.layers import Layer, LayerGroup, layer_groups
from pipelines.planning.networks import adapted_layers, is_trained_in_full, unfrozen_parameters

CONDITION_EMBEDDERS = ("t_embedder.", "y_embedder.", "time_embed.", "label_emb")
"""First parts of the names of layers that embed timesteps and labels."""


class LayerUse(NamedTuple):
    """A layer in a training."""

    layer: Layer
    rank: int
    """Rank of the layer's factors; 0 if it has none."""
    trains_weight: bool
    trains: bool
    """Whether the layer's weight, its bias or its factors are trained."""
    has_input_gradient: bool
    """Whether the backward pass computes the gradient of the layer's input."""

    @property
    def keeps_input(self) -> bool:
        """Whether the gradient of the layer's weight, or of its factors, needs its input."""
        return self.trains_weight or self.rank > 0

    @property
    def forward(self) -> int:
        """Multiply-accumulates of a forward pass on one image."""
        return self.layer.macs + self._factor_a + self._factor_b

    @property
    def backward(self) -> int:
        """Multiply-accumulates of a backward pass on one image."""
        layer, is_attention = self.layer, self.layer.kind == "attention"
        gradients = (2 if is_attention else 1) * self.has_input_gradient + (self.trains_weight and not is_attention)
        return gradients * layer.macs + (1 + self.has_input_gradient) * self._factor_a + 2 * self._factor_b

    @property
    def _factor_a(self) -> int:
        return self.rank * self.layer.rows * self.layer.inputs

    @property
    def _factor_b(self) -> int:
        return self.rank * self.layer.rows * self.layer.outputs


class GroupUse(NamedTuple):
    """A group of layers, such as a block, in a training."""

    group: LayerGroup
    layers: tuple[LayerUse, ...]
    is_reached: bool
    """Whether the backward pass reaches the group: it ends at the first group of which anything is trained."""


def group_uses(model: DiTConfig | UViTConfig, settings: TrainConfig) -> tuple[GroupUse, ...]:
    """Return all groups of a network's layers in a training, in the order in which they compute.

    What a start changes and trains in full beside an adapter is not taken into account. Raises InvalidInput for
    patterns, targets and ranks that a training refuses.
    """
    return _group_uses(model, settings.lora, () if settings.start is None else settings.start.freeze)


@functools.cache
def _group_uses(
    model: DiTConfig | UViTConfig, lora: LoraConfig | None, freeze: tuple[str, ...]
) -> tuple[GroupUse, ...]:
    groups = layer_groups(model)
    if lora is None and not freeze:
        weights = {f"{each.name}.weight" for group in groups for each in group.layers if each.kind != "attention"}
    else:
        weights = set() if lora is not None else {*unfrozen_parameters(model, freeze)}
    modules = {name.rpartition(".")[0] or name for name in weights}
    ranks = {} if lora is None else dict.fromkeys((each.name for each in adapted_layers(model, lora)), lora.chosen_rank)
    # Whether anything is trained before that what a layer reads depends on.
    depends = {"data": False, "condition": False, "tokens": False}
    uses = []
    for group in groups:
        layers = []
        for layer in group.layers:
            rank = ranks.get(layer.name, 0)
            is_trained = bool(rank) or layer.name in modules
            layers.append(LayerUse(layer, rank, f"{layer.name}.weight" in weights, is_trained, depends[layer.reads]))
            if is_trained:
                depends["tokens"] = True
                depends["condition"] |= layer.name.startswith(CONDITION_EMBEDDERS)
        uses.append(GroupUse(group, tuple(layers), depends["tokens"]))
    return tuple(uses)


class TrainingMacs(NamedTuple):
    """Multiply-accumulates of a training step on one image; FLOPs are twice as many."""

    forward: int
    backward: int
    recomputed: int
    """Those of the forward pass that gradient checkpointing computes again; 0 without."""


def training_macs(model: DiTConfig | UViTConfig, settings: TrainConfig) -> TrainingMacs:
    """Return the multiply-accumulates of a training step on one image.

    If everything is trained, the backward pass is taken for two forward passes, as in MFU. Otherwise it is the sum over
    layers that this module describes. Raises the same errors as `group_uses`.
    """
    if is_trained_in_full(settings):
        forward, backward, recomputed = forward_macs(model), 2 * forward_macs(model), forward_macs(model)
    else:
        groups = group_uses(model, settings)
        forward = sum(use.forward for group in groups for use in group.layers)
        backward = sum(use.backward for group in groups for use in group.layers)
        blocks = [each for each in groups if each.is_reached and each.group.kind != "other"]
        recomputed = sum(use.forward for group in blocks for use in group.layers)
    return TrainingMacs(forward, backward, recomputed if model.gradient_checkpointing else 0)
