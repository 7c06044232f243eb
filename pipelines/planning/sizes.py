"""How many parameters a transformer has, and what memory its training takes; needs no torch."""

from typing import NamedTuple

from dit.config import TIMESTEP_FREQUENCIES, DiTConfig, UViTConfig
from dit.schedule import TrainingConfig

FLOAT32 = 4
"""Bytes of weights, gradients, moments and averages: autocast changes none of them."""


class ParameterCounts(NamedTuple):
    """Of one network."""

    trained: int
    fixed: int
    """Position tables that checkpoints hold and nothing trains."""
    block: int
    """Those of the largest block, which FSDP gathers at once."""

    @property
    def total(self) -> int:
        return self.trained + self.fixed


class TrainingMemory(NamedTuple):
    """Bytes of one worker while it trains."""

    weights: float
    gradients: float
    moments: float
    """AdamW's two."""
    averages: float
    gathered: float
    """FSDP: blocks in one piece while they compute."""
    activations: float
    """An estimate: what is kept for backward. Compiled networks keep less."""

    @property
    def total(self) -> float:
        return sum(self)


def count_parameters(config: DiTConfig | UViTConfig) -> ParameterCounts:
    """Closed form of `sum(p.numel() for p in build_model(config).parameters())`."""
    return _uvit_parameters(config) if isinstance(config, UViTConfig) else _dit_parameters(config)


def _dit_parameters(config: DiTConfig) -> ParameterCounts:
    width, hidden = config.hidden_size, config.mlp_size
    norm = width if config.norm == "rms" else 2 * width
    head_norms = 2 * config.head_size if config.qk_norm else 0
    attention = _linear(width, 4 * width) + head_norms
    mlp_hidden = 2 * hidden if config.mlp == "swiglu" else hidden
    conditioning = {
        "adaln_zero": _linear(width, 6 * width),
        "adaln": _linear(width, 4 * width),
        "cross_attention": attention + 3 * norm,
        "in_context": 2 * norm,
    }[config.conditioning]
    block = attention + _linear(width, mlp_hidden) + _linear(hidden, width) + conditioning
    modulated = config.conditioning in ("adaln_zero", "adaln")
    patch = config.patch_size**2
    trained = (
        _linear(patch * config.in_channels, width)
        + _linear(TIMESTEP_FREQUENCIES, width)
        + _linear(width, width)
        + config.num_labels * width
        + config.depth * block
        + _linear(width, patch * config.out_channels)
        + (_linear(width, 2 * width) if modulated else norm)
    )
    return ParameterCounts(trained, 0 if config.position == "rope" else config.num_tokens * width, block)


def _uvit_parameters(config: UViTConfig) -> ParameterCounts:
    width, hidden, channels = config.hidden_size, config.mlp_size, config.in_channels
    qkv = _linear(width, 3 * width) if config.qkv_bias else 3 * width**2
    block = 4 * width + qkv + _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)
    skip = _linear(2 * width, width)
    patch = config.patch_size**2 * channels
    time = _linear(width, 4 * width) + _linear(4 * width, width) if config.mlp_time_embed else 0
    trained = (
        _linear(patch, width)
        + time
        + config.num_labels * width
        + (config.num_conditions + config.num_tokens) * width
        + (config.depth + 1) * block
        + config.depth // 2 * skip
        + 2 * width
        + _linear(width, patch)
        + (9 * channels**2 + channels if config.final_conv else 0)
    )
    return ParameterCounts(trained, 0, block + skip)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def checkpoint_bytes(counts: ParameterCounts, config: TrainingConfig) -> int:
    """Tensors of a checkpoint: weights, averages, AdamW's moments. Headers and JSON add some dozen kilobytes."""
    copies = 2 + len(config.ema_sigma_rels)
    return FLOAT32 * (copies * counts.total + 2 * counts.trained)


def activation_bytes(config: DiTConfig | UViTConfig, dtype: str = "float32") -> float:
    """Bytes that a forward pass keeps for backward, for one image, without compilation.

    dtype: that of autocast, in which linear layers and attention keep their inputs; the sum that runs through the
    blocks, and what norms keep, stay float32.
    """
    tokens = config.num_tokens
    if isinstance(config, UViTConfig) or config.conditioning == "in_context":
        tokens += config.num_conditions
    streams = (config.depth + 3) * tokens * config.hidden_size * FLOAT32
    inside = tokens * _block_bytes(config, 2 if dtype == "bfloat16" else FLOAT32)
    blocks = config.depth + 1 if isinstance(config, UViTConfig) else config.depth
    # With checkpointing the blocks' inputs are kept, and one block at a time is computed again.
    return streams + (inside if config.gradient_checkpointing else blocks * inside)


def _block_bytes(config: DiTConfig | UViTConfig, size: int) -> float:
    """Of one token in one block, beside the block's own input. size: bytes of a number under autocast."""
    width = config.hidden_size
    shared = (1 * FLOAT32 + 4 * size) * width  # input of the second branch; queries, keys, values and their result
    if isinstance(config, UViTConfig):
        joined = 2 * size * width / 2  # by every second block, to a shallow block's tokens
        return shared + 2 * size * (width + config.mlp_size) + joined
    hidden = (4 if config.mlp == "swiglu" else 2) * size * config.mlp_size
    affine_rms = FLOAT32 if config.norm == "rms" else 0
    conditioning = {
        "adaln_zero": 2 * FLOAT32 + 4 * size,  # norms; modulated; what is gated
        "adaln": 2 * FLOAT32 + 2 * size,
        "cross_attention": FLOAT32 + 5 * size + 3 * affine_rms,
        "in_context": 2 * size + 2 * affine_rms,
    }[config.conditioning]
    refinements = (5 * FLOAT32 if config.qk_norm else 0) + (3 * size if config.position == "rope" else 0)
    return shared + hidden + (conditioning + refinements) * width


def training_memory(
    config: DiTConfig | UViTConfig,
    settings: TrainingConfig,
    *,
    images: int,
    dtype: str = "float32",
    shards: int = 1,
) -> TrainingMemory:
    """Bytes of one worker of a data-parallel training.

    images: in one pass of the worker. shards: workers that FSDP divides the state over; 1 for a whole copy (DDP).
    """
    counts = count_parameters(config)
    gathered = FLOAT32 * (counts.total - config.depth * counts.block + 3 * counts.block) if shards > 1 else 0
    # Autocast keeps a copy of every weight until backward is through.
    casts = 2 * counts.trained if dtype == "bfloat16" and not config.gradient_checkpointing else 0
    return TrainingMemory(
        weights=FLOAT32 * counts.total / shards,
        gradients=FLOAT32 * counts.trained / shards,
        moments=2 * FLOAT32 * counts.trained / shards,
        averages=FLOAT32 * (1 + len(settings.ema_sigma_rels)) * counts.total / shards,
        gathered=max(0, gathered),
        activations=images * activation_bytes(config, dtype) + casts,
    )


def sampling_bytes(config: DiTConfig | UViTConfig, dtype: str = "float32") -> float:
    """Bytes that one image takes at most on its way through the network without gradients; about.

    dtype: that of autocast; the sum that runs through the blocks, and what norms give, stay float32.
    """
    size = 2 if dtype == "bfloat16" else FLOAT32
    inside = size * (4 * config.hidden_size + 2 * config.mlp_size)
    return config.num_tokens * (2 * FLOAT32 * config.hidden_size + inside)
