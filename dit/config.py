"""Configurations of the transformers, and the choices of objectives.

Imports no torch, so that recipes are validated without its start-up time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from dit.config_bounds import check_choices, check_sizes, check_types, check_wide_head, nearest_name
from dit.field_names import with_recorded_names
from raydit.errors import InvalidInput

Architecture = Literal["dit", "uvit"]
Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Position = Literal["sincos", "rope"]
FlowTime = Literal["noise"]
FrequencyShift = Literal[0, 1]
Numerics = Literal["diffusers", "official"]
ProcessKind = Literal["diffusion", "flow"]
Schedule = Literal["linear", "cosine", "scaled_linear"]
Prediction = Literal["eps", "x0", "v"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Weighting = Literal["none", "min_snr"]
TimeDensity = Literal["uniform", "logit_normal"]
RandomKind = Literal["counter"]
"""How random numbers are drawn if a recipe sets `random`; otherwise each image has its own generator."""
ResetPart = Literal["labels", "embedding", "final", "positions", "objective"]
"""Parts of a model that a training need not take over from its start; see `dit.start_weights`."""

TIMESTEP_FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding before its two linear layers."""

NORM_EPS = 1e-6
"""Epsilon of DiT's normalisation layers."""

HEAD_ATTENTION_WIDTH = 128
"""Width of the attention heads of a wide head: its source divides 2048 by 16. A narrower wide head has a single one."""

MODEL_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads of DiT's four sizes. Source: Peebles & Xie 2022, table 1 (https://arxiv.org/abs/2212.09748)."""

MODEL_NAMES: tuple[str, ...] = tuple(f"DiT-{size}/{patch}" for size in MODEL_SIZES for patch in (2, 4, 8))
"""Names of the twelve DiT models of the paper; the number after the slash is the patch size."""

UVIT_SIZES: dict[str, dict[str, int | bool]] = {
    "S": {"depth": 12, "hidden_size": 512, "num_heads": 8},
    "S-Deep": {"depth": 16, "hidden_size": 512, "num_heads": 8},
    "M": {"depth": 16, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 20, "hidden_size": 1024, "num_heads": 16},
    "H": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "final_conv": False},
}
"""Fields that each of U-ViT's sizes fixes. As in the published settings, depth does not count the middle block, and
only H has no final convolution. Source: Bao et al. 2022, table 1 (https://arxiv.org/abs/2209.12152)."""

UVIT_NAMES: tuple[str, ...] = tuple(f"U-ViT-{size}/{patch}" for size in UVIT_SIZES for patch in (2, 4))
"""Names of the U-ViT models: every size with the two patch sizes of the paper."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Fields that both architectures share: shape of the latents, size of the transformer, classes.

    Raises InvalidInput if a field is out of range or fields contradict each other.
    """

    input_size: int | tuple[int, int] = 32
    """Height and width of the latents, in latent pixels; a single number for square latents."""
    patch_size: int = 2
    """Side length of the square patch that becomes one token, in latent pixels."""
    in_channels: int = 4
    """Channels of the latents."""
    hidden_size: int = 1152
    """Width of the tokens; must be a multiple of num_heads and of 4 (U-ViT: of 2)."""
    depth: int = 28
    """Number of transformer blocks."""
    num_heads: int = 16
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, in multiples of hidden_size."""
    num_classes: int = 1000
    """Number of classes; 0 for an unconditional model, which takes no labels."""
    class_dropout_prob: float = 0.1
    """Probability that training replaces all conditions of an image by the null ones; above 0, the label table has a
    row for the null class. Recorded under this name; functions that take fields also take condition_dropout_prob."""
    gradient_checkpointing: bool = False
    """Whether the backward pass recomputes the blocks: takes about a third more time and much less memory."""

    def __post_init__(self) -> None:
        if isinstance(self.input_size, list):  # JSON and TOML have no tuples
            object.__setattr__(self, "input_size", tuple(self.input_size))
        check_types(self)
        check_sizes(self)
        height, width = self.latent_size
        if height % self.patch_size or width % self.patch_size:
            raise InvalidInput(
                f"input_size is {height}x{width}",
                f"both sides to be multiples of patch_size = {self.patch_size}",
                "choose another patch_size or another image size",
            )

    def _check_width(self, multiple: int, reason: str) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % multiple:
            raise InvalidInput(
                f"hidden_size is {self.hidden_size}",
                f"a multiple of num_heads = {self.num_heads} and of {multiple} ({reason})",
                "change hidden_size or num_heads",
            )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.latent_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Number of image tokens, which is the number of patches."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def num_conditions(self) -> int:
        """Number of conditions: the timestep, and the label if there are classes."""
        return 2 if self.num_classes else 1

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the model's output."""
        return self.in_channels

    @property
    def condition_dropout_prob(self) -> float:
        """Probability that training replaces all conditions of an image by the null ones."""
        return self.class_dropout_prob

    @property
    def null_class(self) -> int | None:
        """Label that stands for "no label", or None when the model has none."""
        return self.num_classes if self.num_classes > 0 and self.class_dropout_prob > 0 else None

    @property
    def num_labels(self) -> int:
        """Number of rows of the label table: the classes, and the null class if there is one."""
        return self.num_classes + (self.null_class is not None)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Configuration of a diffusion transformer; the defaults are DiT-XL/2 on 256 px ImageNet latents.

    Source: Peebles & Xie 2022 (https://arxiv.org/abs/2212.09748). All defaults are those of the paper. qk_norm,
    norm, mlp, position, head_width and head_depth are later refinements, which change its numbers. In
    timestep_frequency_shift and mlp_norm_eps diffusers differs from the official code, and flow_time says how weights
    count the time of a flow.
    """

    architecture: Literal["dit"] = "dit"
    """Distinguishes a recorded configuration from that of a U-ViT."""
    learn_sigma: bool = True
    """Whether the model predicts a second set of channels, for the variance "learned_range" of a diffusion."""
    conditioning: Conditioning = "adaln_zero"
    """How timestep and label reach the tokens: one of the four block designs of section 3.2 of the paper."""
    qk_norm: bool = False
    """Whether the queries and keys of each head pass an RMS norm with weights (https://arxiv.org/abs/2302.05442)."""
    norm: Norm = "layer"
    """Normalisation layer; "rms" neither subtracts the mean nor adds a shift (https://arxiv.org/abs/1910.07467)."""
    mlp: Mlp = "gelu"
    """Feed-forward layer; "swiglu" is gated by SiLU (https://arxiv.org/abs/2002.05202) and two thirds as wide, which
keeps the number of parameters."""
    position: Position = "sincos"
    """Position encoding; "rope" rotates queries and keys of image tokens by row and column
(https://arxiv.org/abs/2104.09864)."""
    timestep_frequency_shift: int = 0
    """Frequencies of the timestep embedding: 0 as in the official code, 1 as in diffusers' DiT."""
    mlp_norm_eps: float = NORM_EPS
    """Epsilon of the layer norm before each MLP of an adaLN-Zero model; 1e-5 in most DiT pipelines of diffusers."""
    head_width: int | None = None
    """Width of a wide head after the blocks (`dit.layers.head`, https://arxiv.org/abs/2510.11690); None for no head."""
    head_depth: int | None = None
    """Number of blocks of the wide head, 2 in its source; None for no head."""
    flow_time: FlowTime | None = None
    """Time of a flow as the weights count it: None from 0 (noise) to 1 (data), as in SiT; "noise" from 0 (data) to 1
    (noise), as in REPA, whose velocity is noise - data. The model is called in raydit's times either way, and returns
    the velocity data - noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self, architecture=Literal["dit"], conditioning=Conditioning, norm=Norm, mlp=Mlp, position=Position
        )
        if self.flow_time is not None:
            check_choices(self, flow_time=FlowTime)
        self._check_width(4, "two sines and two cosines per position")
        if self.timestep_frequency_shift not in get_args(FrequencyShift):
            raise InvalidInput(
                f"timestep_frequency_shift is {self.timestep_frequency_shift}",
                "0 or 1",
                "use 0 as in the official code, or 1 for a model that diffusers can run without extra code",
            )
        if self.mlp_norm_eps != NORM_EPS and (self.conditioning, self.norm) != ("adaln_zero", "layer"):
            raise InvalidInput(
                f"mlp_norm_eps is {self.mlp_norm_eps}",
                f"{NORM_EPS} unless conditioning is 'adaln_zero' and norm is 'layer'",
                "remove mlp_norm_eps",
            )
        if self.position == "rope" and self.head_size % 4:
            raise InvalidInput(
                f"position is 'rope' with heads of width {self.head_size} (hidden_size {self.hidden_size} / num_heads "
                f"{self.num_heads})",
                "a head width that is a multiple of 4, which gives each axis pairs of entries to rotate",
                "change num_heads, or use 'sincos'",
            )
        check_wide_head(self, HEAD_ATTENTION_WIDTH)

    @property
    def head(self) -> "DiTConfig | None":
        """The wide head as a DiT of its own width and depth, of which it has patches, blocks and final layer."""
        if self.head_width is None or self.head_depth is None:
            return None
        width, heads = self.head_width, max(1, self.head_width // HEAD_ATTENTION_WIDTH)
        return replace(
            self, hidden_size=width, depth=self.head_depth, num_heads=heads, head_width=None, head_depth=None
        )

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP; with "swiglu" the multiple of 8 nearest to two thirds of the width with "gelu"."""
        plain = super().mlp_size
        return max(8, 8 * round(plain / 12)) if self.mlp == "swiglu" else plain

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: twice in_channels when sigma is learned."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels


@dataclass(frozen=True, kw_only=True)
class UViTConfig(TransformerConfig):
    """Configuration of a U-ViT; the defaults are H/2 on 256 px ImageNet latents, plus a final convolution.

    Source: Bao et al. 2022 (https://arxiv.org/abs/2209.12152). depth counts the blocks that long skip connections
    join in pairs, and not the middle block. A U-ViT never learns sigma.
    """

    architecture: Literal["uvit"] = "uvit"
    """Distinguishes a recorded configuration from that of a DiT."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    mlp_time_embed: bool = False
    """Whether the timestep embedding passes two linear layers before it becomes a token."""
    final_conv: bool = True
    """Whether a 3x3 convolution follows the linear map from tokens to patches."""
    first_timestep: int = 0
    """Offset added to every timestep; 1 for the official weights, which count timesteps from 1 to 1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, architecture=Literal["uvit"])
        self._check_width(2, "a sine and a cosine per frequency of the timestep")
        if self.depth % 2:
            raise InvalidInput(
                f"depth is {self.depth}",
                "an even number, because skip connections join blocks in pairs",
                "do not count the middle block",
            )


def named_config(name: str, **overrides: Any) -> DiTConfig | UViTConfig:
    """Return the configuration of one of MODEL_NAMES or UVIT_NAMES, with `overrides` instead of its own fields.

    Raises InvalidInput for an unknown name, an unknown field or a value out of range.
    """
    known = MODEL_NAMES + UVIT_NAMES
    if name not in known:
        raise InvalidInput(f"name is {name!r}", f"one of {', '.join(known)}", nearest_name(name, known))
    size, patch = name.removeprefix("U-ViT-").removeprefix("DiT-").split("/")
    if name in UVIT_NAMES:
        return config_from_dict({"architecture": "uvit", **UVIT_SIZES[size], "patch_size": int(patch), **overrides})
    return config_from_dict({**MODEL_SIZES[size], "patch_size": int(patch), **overrides})


def config_from_dict(content: Mapping[str, Any]) -> DiTConfig | UViTConfig:
    """Build a configuration from the fields that a checkpoint records under "model", or from their synonyms.

    Without "architecture" the fields are those of a DiT. Raises InvalidInput for an unknown architecture, an unknown
    field, a value out of range, or two values of one field.
    """
    content = with_recorded_names(content)
    known = {"dit": DiTConfig, "uvit": UViTConfig}
    architecture = content.get("architecture", "dit")
    if not isinstance(architecture, str) or architecture not in known:
        raise InvalidInput(
            f"architecture is {architecture!r}", f"one of {', '.join(known)}", nearest_name(architecture, tuple(known))
        )
    config = known[architecture]
    names = tuple(field.name for field in fields(config))
    for name in content:
        if name not in names:
            raise InvalidInput(
                f"{name} is not a field of a {architecture} model",
                f"one of {', '.join(names)}",
                nearest_name(name, names, cutoff=0.6),
            )
    return config(**content)


def recorded_fields(config: DiTConfig | UViTConfig) -> dict[str, Any]:
    """Return a configuration as checkpoints record it, from which `config_from_dict` builds it again.

    Fields that are None are left out, so that a model without them is recorded as it was before there were any.
    """
    return {name: value for name, value in asdict(config).items() if value is not None}
