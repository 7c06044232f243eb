"""The networks of a recipe by their shapes and numbers of parameters, without their memory, and without downloads."""

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dit.autoencoders import size as autoencoder_size
from dit.autoencoders.kinds import autoencoder_class, describe_shape, latent_side, moments_channels
from dit.autoencoders.size import AutoencoderSize
from dit.config import TIMESTEP_FREQUENCIES, DiTConfig, UViTConfig
from dit.hub import split_revision
from dit.lora_targets import KINDS
from dit.schedule import TrainingConfig
from pipelines.config.autoencoder_training import measured_at_once
from pipelines.config.encode import EncodeConfig
from pipelines.config.lora import LoraConfig
from pipelines.config.model import AbsentModel
from pipelines.config.recipe import AutoencoderConfig, Recipe
from pipelines.config.training import TrainConfig
from pipelines.planning.layers import Layer, network_layers
from raydit.errors import NotFound

FLOAT32 = 4
"""Bytes of one number in weights, gradients, AdamW's moments and averages, which autocast leaves in float32."""


class Networks(NamedTuple):
    """The transformer of a recipe, and the two halves of its autoencoder."""

    model: DiTConfig | UViTConfig
    encoder: AutoencoderSize
    decoder: AutoencoderSize
    moments_channels: int
    """Channels of the stored moments: those of the latents, and of a log variance unless it is deterministic."""
    trained_share: float = 1.0
    """Share of an image's pixels that training of the autoencoder computes: below 1 for crops."""
    measured_at_once: int = 1
    """Whole images that are encoded or decoded at once where a trained autoencoder is measured."""
    encoding: EncodeConfig | None = None
    """Settings with which training encodes its images; None where their moments are stored."""


def resolve_networks(config: Recipe, num_classes: int) -> Networks:
    """Return the networks of a recipe.

    Raises NotFound for an autoencoder whose size this machine does not know, and InvalidInput if the images, the
    autoencoder and the model do not fit together.
    """
    autoencoder, side = autoencoder_config(config.autoencoder), config.images.size
    shape = describe_shape(autoencoder)
    model = config.model.resolve(
        input_size=latent_side(side, shape),
        in_channels=shape["latent_channels"],
        num_classes=num_classes,
        learn_sigma=config.objective.learn_sigma,
    )
    model = replace(model, gradient_checkpointing=config.train.gradient_checkpointing)
    encoder, decoder = autoencoder_size.encoder_size, autoencoder_size.decoder_size
    crop = config.autoencoder.train.crop if config.autoencoder.train else None
    return Networks(
        model,
        encoder(autoencoder, side),
        decoder(autoencoder, side),
        moments_channels(shape),
        trained_share=((crop or side) / side) ** 2,
        measured_at_once=measured_at_once(side),
        encoding=None if config.encode.stores_moments else config.encode,
    )


def check_networks(config: Recipe) -> None:
    """Raise InvalidInput if a recipe's images, autoencoder and model do not fit together.

    Downloads nothing: an autoencoder that is not on this machine is not checked.
    """
    try:
        if isinstance(config.model, AbsentModel):
            latent_side(config.images.size, describe_shape(autoencoder_config(config.autoencoder)))
        else:
            resolve_networks(config, num_classes=1)
    except NotFound:
        return


def autoencoder_config(autoencoder: AutoencoderConfig) -> dict[str, Any]:
    """Return the diffusers config of an autoencoder. Raises NotFound where it would have to be downloaded."""
    id, train = autoencoder.id, autoencoder.train
    if train is not None and train.start is not None:
        id = train.start
    elif train is not None:
        return autoencoder_size.own_config(
            latent_channels=train.latent_channels, downsample=train.downsample, width=train.width
        )
    assert id is not None, "a recipe has an autoencoder's id, or settings to train one"
    if split_revision(id)[0] in autoencoder_size.STABLE_DIFFUSION:
        return autoencoder_size.STABLE_DIFFUSION_CONFIG
    if (Path(id) / "config.json").is_file():
        return _supported_config(Path(id))
    from dit.autoencoder import locate_autoencoder  # imports torch

    try:
        return _supported_config(locate_autoencoder(id, download=False))
    except FileNotFoundError:
        raise NotFound(
            f"autoencoder.id: found {id!r}, which is not on this machine, so that its size is unknown",
            f"a diffusers folder, a hub id that is cached, or one of {', '.join(autoencoder_size.STABLE_DIFFUSION)}",
            "Download it first",
        ) from None


def _supported_config(folder: Path) -> dict[str, Any]:
    config = autoencoder_size.read_config(folder)
    autoencoder_class(config, folder)  # raises for a class whose size is not known
    return config


class ParameterCounts(NamedTuple):
    """How many parameters one network has."""

    trained: int
    fixed: int
    """Position tables, which checkpoints hold and training does not change."""
    block: int
    """Parameters of the largest block, which FSDP gathers at once."""
    blocks: int
    """Parameters of all blocks."""

    @property
    def total(self) -> int:
        """Trained and fixed parameters."""
        return self.trained + self.fixed


def count_parameters(model: DiTConfig | UViTConfig) -> ParameterCounts:
    """Count a network's parameters: the closed form of `sum(p.numel() for p in build_model(model).parameters())`."""
    return _uvit_parameters(model) if isinstance(model, UViTConfig) else _dit_parameters(model)


def _dit_parameters(model: DiTConfig) -> ParameterCounts:
    width, patch = model.hidden_size, model.patch_size**2
    norm = width if model.norm == "rms" else 2 * width
    attention = _attention(model)
    conditioning = {
        "adaln_zero": _linear(width, 6 * width),
        "adaln": _linear(width, 4 * width),
        "cross_attention": attention + 3 * norm,
        "in_context": 2 * norm,
    }[model.conditioning]
    block = attention + _feed_forward(model) + conditioning
    blocks = model.depth * block
    head = model.head or model  # has the final layer
    if model.head is not None:
        head_block = _attention(head) + _feed_forward(head) + _linear(head.hidden_size, 6 * head.hidden_size)
        blocks, block = blocks + head.depth * head_block, max(block, head_block)
    trained = (
        _linear(patch * model.in_channels, width)
        + _linear(TIMESTEP_FREQUENCIES, width)
        + _linear(width, width)
        + model.num_labels * width
        + blocks
        + (_wide_head_ends(head, width) if model.head is not None else 0)
        + _linear(head.hidden_size, patch * model.out_channels)
        + (_linear(head.hidden_size, 2 * head.hidden_size) if model.conditioning in ("adaln_zero", "adaln") else norm)
    )
    return ParameterCounts(trained, 0 if model.position == "rope" else model.num_tokens * width, block, blocks)


def _attention(model: DiTConfig) -> int:
    return _linear(model.hidden_size, 4 * model.hidden_size) + (2 * model.head_size if model.qk_norm else 0)


def _feed_forward(model: DiTConfig) -> int:
    hidden = model.mlp_size
    return _linear(model.hidden_size, 2 * hidden if model.mlp == "swiglu" else hidden) + _linear(
        hidden, model.hidden_size
    )


def _wide_head_ends(head: DiTConfig, trunk_width: int) -> int:
    """Return the parameters of a wide head before its blocks: the embedding of patches, and the trunk's projection."""
    return _linear(head.patch_size**2 * head.in_channels, head.hidden_size) + _linear(trunk_width, head.hidden_size)


def _uvit_parameters(model: UViTConfig) -> ParameterCounts:
    width, hidden, channels = model.hidden_size, model.mlp_size, model.in_channels
    patch = model.patch_size**2 * channels
    qkv = _linear(width, 3 * width) if model.qkv_bias else 3 * width**2
    block = 4 * width + qkv + _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)
    skip = _linear(2 * width, width)
    blocks = (model.depth + 1) * block + model.depth // 2 * skip
    trained = (
        _linear(patch, width)
        + (_linear(width, 4 * width) + _linear(4 * width, width) if model.mlp_time_embed else 0)
        + (model.num_labels + model.num_conditions + model.num_tokens) * width
        + blocks
        + 2 * width
        + _linear(width, patch)
        + (9 * channels**2 + channels if model.final_conv else 0)
    )
    return ParameterCounts(trained, 0, block + skip, blocks)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def trained_parameters(model: DiTConfig | UViTConfig, settings: TrainConfig) -> int:
    """Count what a training changes: all trained parameters of a network but frozen ones, or those of an adapter.

    Raises InvalidInput for a pattern of train.start.freeze or a target of train.lora that matches nothing, for a rank
    that does not fit, and if nothing is left to train.
    """
    if settings.lora is not None:
        return adapter_parameters(model, settings.lora)
    if is_trained_in_full(settings):
        return count_parameters(model).trained
    assert settings.start is not None, "only parameters of a start are frozen"
    return sum(unfrozen_parameters(model, settings.start.freeze).values())


def is_trained_in_full(settings: TrainConfig) -> bool:
    """Return whether a training trains all parameters: no adapter instead of them, and none of them is frozen."""
    return settings.lora is None and (settings.start is None or not settings.start.freeze)


@functools.cache
def unfrozen_parameters(model: DiTConfig | UViTConfig, patterns: tuple[str, ...]) -> Mapping[str, int]:
    """Return the sizes of the parameters that are trained if some are frozen, by their names.

    patterns: of train.start.freeze. Raises InvalidInput for one that matches nothing, or if nothing is left to train.
    """
    import torch  # in here, because it takes seconds

    from dit.model import build_model
    from dit.trained_parameters import freeze

    with torch.device("meta"):
        network = build_model(model)
    freeze(network, patterns)
    return {name: parameter.numel() for name, parameter in network.named_parameters() if parameter.requires_grad}


def adapter_parameters(model: DiTConfig | UViTConfig, lora: LoraConfig) -> int:
    """Count the parameters of a low-rank adapter: the rank times the two widths of each layer.

    What a start changes and trains in full is not counted. Raises the same errors as `adapted_layers`.
    """
    return lora.chosen_rank * sum(layer.inputs + layer.outputs for layer in adapted_layers(model, lora))


@functools.cache
def adapted_layers(model: DiTConfig | UViTConfig, lora: LoraConfig) -> tuple[Layer, ...]:
    """Return the layers of a network that have factors in a low-rank adapter, as training chooses them.

    Globs import torch. Raises InvalidInput for a target that matches no layer, and for a rank above a layer's widths.
    """
    linear = [layer for layer in network_layers(model) if layer.kind == "linear"]
    if set(lora.chosen_targets) <= {*KINDS}:
        by_word = [[each for each in linear if re.fullmatch(KINDS[word], each.name)] for word in lora.chosen_targets]
        chosen = [layer for layers in by_word for layer in layers]
        if all(by_word) and lora.chosen_rank <= min(min(layer.inputs, layer.outputs) for layer in chosen):
            return tuple(chosen)
    import torch  # in here, because it takes seconds

    from dit.lora import adapter_config
    from dit.model import build_model

    with torch.device("meta"):
        network = build_model(model)
    rank, alpha, targets = lora.chosen_rank, lora.chosen_alpha, lora.chosen_targets
    names = {*adapter_config(network, rank=rank, alpha=alpha, targets=targets).layers}
    return tuple(layer for layer in linear if layer.name in names)


def checkpoint_bytes(model: DiTConfig | UViTConfig, settings: TrainingConfig) -> int:
    """Return the bytes of a checkpoint's tensors: weights, averages and AdamW's two moments, or those of an adapter.

    File headers and JSON add some dozens of kilobytes.
    """
    copies, counts = 2 + len(settings.ema_sigma_rels), count_parameters(model)
    written, trained = counts.total, counts.trained
    if isinstance(settings, TrainConfig):
        trained = trained_parameters(model, settings)
        written = trained if settings.lora is not None else written
    return FLOAT32 * (copies * written + 2 * trained)
