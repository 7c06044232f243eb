"""Closed forms for a transformer's parameters, activations and checkpoints; needs no torch."""

from typing import NamedTuple

from dit.config import TIMESTEP_FREQUENCIES, DiTConfig, UViTConfig
from dit.schedule import TrainingConfig

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of one number, by dtype."""
FLOAT32 = NUMBER_BYTES["float32"]
"""Bytes of one number in weights, gradients, AdamW's moments and averages, which autocast leaves in float32."""


class ParameterCounts(NamedTuple):
    """How many parameters one network has."""

    trained: int
    fixed: int
    """Position tables, which checkpoints hold and training does not change."""
    block: int
    """Parameters of the largest block, which FSDP gathers at once."""

    @property
    def total(self) -> int:
        """Trained and fixed parameters."""
        return self.trained + self.fixed


def count_parameters(model: DiTConfig | UViTConfig) -> ParameterCounts:
    """Count a network's parameters: the closed form of `sum(p.numel() for p in build_model(model).parameters())`."""
    return _uvit_parameters(model) if isinstance(model, UViTConfig) else _dit_parameters(model)


def _dit_parameters(model: DiTConfig) -> ParameterCounts:
    width, hidden, patch = model.hidden_size, model.mlp_size, model.patch_size**2
    norm = width if model.norm == "rms" else 2 * width
    attention = _linear(width, 4 * width) + (2 * model.head_size if model.qk_norm else 0)
    mlp = _linear(width, 2 * hidden if model.mlp == "swiglu" else hidden) + _linear(hidden, width)
    conditioning = {
        "adaln_zero": _linear(width, 6 * width),
        "adaln": _linear(width, 4 * width),
        "cross_attention": attention + 3 * norm,
        "in_context": 2 * norm,
    }[model.conditioning]
    block = attention + mlp + conditioning
    trained = (
        _linear(patch * model.in_channels, width)
        + _linear(TIMESTEP_FREQUENCIES, width)
        + _linear(width, width)
        + model.num_labels * width
        + model.depth * block
        + _linear(width, patch * model.out_channels)
        + (_linear(width, 2 * width) if model.conditioning in ("adaln_zero", "adaln") else norm)
    )
    return ParameterCounts(trained, 0 if model.position == "rope" else model.num_tokens * width, block)


def _uvit_parameters(model: UViTConfig) -> ParameterCounts:
    width, hidden, channels = model.hidden_size, model.mlp_size, model.in_channels
    patch = model.patch_size**2 * channels
    qkv = _linear(width, 3 * width) if model.qkv_bias else 3 * width**2
    block = 4 * width + qkv + _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)
    skip = _linear(2 * width, width)
    trained = (
        _linear(patch, width)
        + (_linear(width, 4 * width) + _linear(4 * width, width) if model.mlp_time_embed else 0)
        + (model.num_labels + model.num_conditions + model.num_tokens) * width
        + (model.depth + 1) * block
        + model.depth // 2 * skip
        + 2 * width
        + _linear(width, patch)
        + (9 * channels**2 + channels if model.final_conv else 0)
    )
    return ParameterCounts(trained, 0, block + skip)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def checkpoint_bytes(model: DiTConfig | UViTConfig, settings: TrainingConfig) -> int:
    """Return the bytes of a checkpoint's tensors: weights, averages and AdamW's two moments.

    File headers and JSON add some dozens of kilobytes.
    """
    counts, copies = count_parameters(model), 2 + len(settings.ema_sigma_rels)
    return FLOAT32 * (copies * counts.total + 2 * counts.trained)


def activation_bytes(model: DiTConfig | UViTConfig, dtype: str = "float32") -> float:
    """Return the bytes that a forward pass keeps for the backward pass, per image, without compilation.

    dtype: the dtype of autocast, in which linear layers and attention keep their inputs. The residual stream and what
    norms keep stay float32.
    """
    tokens = model.num_tokens
    if isinstance(model, UViTConfig) or model.conditioning == "in_context":
        tokens += model.num_conditions
    residuals = (model.depth + 3) * tokens * model.hidden_size * FLOAT32
    block = tokens * _block_bytes_per_token(model, NUMBER_BYTES[dtype])
    blocks = model.depth + 1 if isinstance(model, UViTConfig) else model.depth
    # Gradient checkpointing keeps the blocks' inputs and recomputes one block at a time.
    return residuals + (block if model.gradient_checkpointing else blocks * block)


def _block_bytes_per_token(model: DiTConfig | UViTConfig, size: int) -> float:
    """Return what one block keeps per token besides its input. size: bytes of a number under autocast."""
    width = model.hidden_size
    shared = (FLOAT32 + 4 * size) * width  # input of the second branch; queries, keys, values and attention's output
    if isinstance(model, UViTConfig):
        skips = 2 * size * width / 2  # every second block concatenates a shallow block's output
        return shared + 2 * size * (width + model.mlp_size) + skips
    hidden = (4 if model.mlp == "swiglu" else 2) * size * model.mlp_size
    affine_rms = FLOAT32 if model.norm == "rms" else 0
    conditioning = {
        "adaln_zero": 2 * FLOAT32 + 4 * size,  # norms; their modulated outputs; the gated outputs
        "adaln": 2 * FLOAT32 + 2 * size,
        "cross_attention": FLOAT32 + 5 * size + 3 * affine_rms,
        "in_context": 2 * size + 2 * affine_rms,
    }[model.conditioning]
    refinements = (5 * FLOAT32 if model.qk_norm else 0) + (3 * size if model.position == "rope" else 0)
    return shared + hidden + (conditioning + refinements) * width


def sampling_bytes(model: DiTConfig | UViTConfig, dtype: str = "float32") -> float:
    """Return about how many bytes a forward pass without gradients holds at its peak, per image.

    dtype: the dtype of autocast. The residual stream and the norms' outputs stay float32.
    """
    block = NUMBER_BYTES[dtype] * (4 * model.hidden_size + 2 * model.mlp_size)
    return model.num_tokens * (2 * FLOAT32 * model.hidden_size + block)
