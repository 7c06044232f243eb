"""What a diffusion transformer and a sampler may be; needs no torch, so recipes are checked at once."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Position = Literal["sincos", "rope"]
Numerics = Literal["diffusers", "official"]
ProcessKind = Literal["diffusion", "flow"]
Schedule = Literal["linear", "cosine", "scaled_linear"]
Prediction = Literal["eps", "x0", "v"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Weighting = Literal["none", "min_snr"]
TimeDensity = Literal["uniform", "logit_normal"]

TIMESTEP_FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding before its two linear layers."""

NORM_EPS = 1e-6
"""Epsilon of DiT's norms."""

MODEL_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads of the four sizes. Source: Peebles & Xie 2022, table 1 (https://arxiv.org/abs/2212.09748)."""

MODEL_NAMES: tuple[str, ...] = tuple(f"DiT-{size}/{patch}" for size in MODEL_SIZES for patch in (2, 4, 8))
"""The twelve models of the paper; the number after the slash is the patch size."""

UVIT_SIZES: dict[str, dict[str, int | bool]] = {
    "S": {"depth": 12, "hidden_size": 512, "num_heads": 8},
    "S-Deep": {"depth": 16, "hidden_size": 512, "num_heads": 8},
    "M": {"depth": 16, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 20, "hidden_size": 1024, "num_heads": 16},
    "H": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "final_conv": False},
}
"""U-ViT's sizes; the middle block comes on top of depth, as in the published weights' settings, and only the
published H ends without a convolution. Source: Bao et al. 2022, table 1 (https://arxiv.org/abs/2209.12152)."""

UVIT_NAMES: tuple[str, ...] = tuple(f"U-ViT-{size}/{patch}" for size in UVIT_SIZES for patch in (2, 4))
"""U-ViT's sizes with the two patch sizes of its paper."""

SAMPLER_PROCESSES: dict[str, ProcessKind] = {
    "ddpm": "diffusion",
    "ddim": "diffusion",
    "dpmpp_2m": "diffusion",
    "euler": "flow",
    "heun": "flow",
}
"""Every sampler's name and the kind of process that it integrates."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What both architectures share: the latents' shape, the transformer's size, the labels.

    Raises ValueError when fields do not fit together.
    """

    input_size: int | tuple[int, int] = 32
    """Height and width of the latents, in latent pixels; one number means a square."""
    patch_size: int = 2
    """Side of the square patch that becomes one token, in latent pixels."""
    in_channels: int = 4
    """Channels of the latents."""
    hidden_size: int = 1152
    """Width of the tokens; a multiple of num_heads and of 4 (U-ViT: of 2)."""
    depth: int = 28
    """Number of transformer blocks."""
    num_heads: int = 16
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, in multiples of hidden_size."""
    num_classes: int = 1000
    """Number of classes; 0 makes an unconditional model, which takes no labels."""
    class_dropout_prob: float = 0.1
    """Share of training labels replaced by the null class; above 0 the label table gets a row for it."""
    gradient_checkpointing: bool = False
    """Whether blocks are recomputed in the backward pass: about a third more time for much less memory."""

    def __post_init__(self) -> None:
        if isinstance(self.input_size, list):  # JSON and TOML know no tuples
            object.__setattr__(self, "input_size", tuple(self.input_size))
        self._check_ranges()
        height, width = self.latent_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"input_size is {height}x{width}, but patch_size {self.patch_size} must divide both sides: "
                "choose another patch_size, or another image size"
            )

    def _check_ranges(self) -> None:
        sizes = {"input_size": min(self.latent_size)} | {
            name: getattr(self, name)
            for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio")
        }
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}, but it must be above 0: give a positive number")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}, but it must be 0 or more: use 0 for no labels")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(
                f"class_dropout_prob is {self.class_dropout_prob}, but it must be in [0, 1): "
                "use 0.1 as in the paper, or 0 for a model that is never guided"
            )

    def _check_width(self, multiple: int, reason: str) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % multiple:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but it must be a multiple of num_heads {self.num_heads} "
                f"and of {multiple} ({reason}): change hidden_size or num_heads"
            )

    def _check_choices(self, **choices: Any) -> None:
        for name, literal in choices.items():
            found, known = getattr(self, name), get_args(literal)
            if found not in known:
                raise ValueError(
                    f"{name} is {found!r}, but it must be one of {', '.join(known)}: {_advice(found, known)}"
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
        """Number of image tokens."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def num_conditions(self) -> int:
        """What the model is conditioned on: the timestep, and the label if there are classes."""
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
    def null_class(self) -> int | None:
        """Label that stands for "no label", or None when the model has none."""
        return self.num_classes if self.num_classes > 0 and self.class_dropout_prob > 0 else None

    @property
    def num_labels(self) -> int:
        """Rows of the label table: the classes, and the null class if there is one."""
        return self.num_classes + (self.null_class is not None)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Shape of a diffusion transformer; the defaults are DiT-XL/2 on 256 px ImageNet latents.

    Source: Peebles & Xie 2022 (https://arxiv.org/abs/2212.09748). The last six fields are off by default: later
    refinements, which change the paper's numbers, and two of diffusers' deviations from the official code.
    """

    architecture: Literal["dit"] = "dit"
    """Tells a recorded configuration from a U-ViT's."""
    learn_sigma: bool = True
    """Whether a second set of channels is predicted, for the variance "learned_range" of a diffusion."""
    conditioning: Conditioning = "adaln_zero"
    """How timestep and label reach the tokens: one of the four block designs of the paper's section 3.2."""
    qk_norm: bool = False
    """Whether each head's queries and keys pass an RMS norm with weights (https://arxiv.org/abs/2302.05442)."""
    norm: Norm = "layer"
    """"rms" leaves out the mean and the shift of every norm (https://arxiv.org/abs/1910.07467)."""
    mlp: Mlp = "gelu"
    """"swiglu" gates with SiLU (https://arxiv.org/abs/2002.05202), two thirds as wide: as many parameters."""
    position: Position = "sincos"
    """"rope" rotates queries and keys of image tokens by row and column (https://arxiv.org/abs/2104.09864)."""
    timestep_frequency_shift: int = 0
    """0: frequencies of the timestep embedding as in the official code; 1: as in diffusers' DiT."""
    mlp_norm_eps: float = NORM_EPS
    """Epsilon of the layer norm before each MLP of an adaLN-Zero model; 1e-5 in most of diffusers' DiTs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices(
            architecture=Literal["dit"], conditioning=Conditioning, norm=Norm, mlp=Mlp, position=Position
        )
        self._check_width(4, "two sines and two cosines per position")
        if self.timestep_frequency_shift not in (0, 1):
            raise ValueError(
                f"timestep_frequency_shift is {self.timestep_frequency_shift}, but it must be 0 or 1: use 0 as in the "
                "official code, or 1 for a model that diffusers runs as it is"
            )
        if self.mlp_norm_eps != NORM_EPS and (self.conditioning, self.norm) != ("adaln_zero", "layer"):
            raise ValueError(
                f"mlp_norm_eps is {self.mlp_norm_eps}, but only layer norms of adaln_zero blocks can differ from "
                f"{NORM_EPS}: leave it out"
            )
        if self.position == "rope" and self.head_size % 4:
            raise ValueError(
                f"position is 'rope', but heads are {self.head_size} wide (hidden_size {self.hidden_size} / num_heads "
                f"{self.num_heads}) and must be a multiple of 4 wide, a pair for each axis: change num_heads, or use "
                "'sincos'"
            )

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP; of the gated one, a multiple of 8 near two thirds of the plain one's."""
        plain = super().mlp_size
        return max(8, 8 * round(plain / 12)) if self.mlp == "swiglu" else plain

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: twice in_channels when sigma is learned."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels


@dataclass(frozen=True, kw_only=True)
class UViTConfig(TransformerConfig):
    """Shape of a U-ViT; the defaults are H/2's on 256 px ImageNet latents, with a last convolution.

    Source: Bao et al. 2022 (https://arxiv.org/abs/2209.12152). depth counts the blocks that long skip
    connections join two by two; the middle block comes on top. Sigma is never learned.
    """

    architecture: Literal["uvit"] = "uvit"
    """Tells a recorded configuration from a DiT's."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    mlp_time_embed: bool = False
    """Whether the timestep's embedding passes two linear layers before it becomes a token."""
    final_conv: bool = True
    """Whether a 3x3 convolution follows the patches' linear map."""
    first_timestep: int = 0
    """Added to every timestep that the model is given; 1 for the official weights, which count 1..1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices(architecture=Literal["uvit"])
        self._check_width(2, "a sine and a cosine per frequency of the timestep")
        if self.depth % 2:
            raise ValueError(
                f"depth is {self.depth}, but it must be even, as skip connections join blocks two by two: leave the "
                "middle block out of the count"
            )


def named_config(name: str, **overrides: Any) -> DiTConfig | UViTConfig:
    """The configuration of one of MODEL_NAMES or UVIT_NAMES, its fields replaced by overrides.

    Raises ValueError for an unknown name, and as the configurations do.
    """
    known = MODEL_NAMES + UVIT_NAMES
    if name not in known:
        raise ValueError(f"model name is {name!r}, but it must be one of {', '.join(known)}: {_advice(name, known)}")
    size, patch = name.removeprefix("U-ViT-").removeprefix("DiT-").split("/")
    if name in UVIT_NAMES:
        return config_from_dict({"architecture": "uvit", **UVIT_SIZES[size], "patch_size": int(patch), **overrides})
    return config_from_dict({**MODEL_SIZES[size], "patch_size": int(patch), **overrides})


def config_from_dict(content: Mapping[str, Any]) -> DiTConfig | UViTConfig:
    """The configuration that a checkpoint records under "model"; without an architecture it is a DiT's.

    Raises ValueError for an unknown architecture or field, and as the configurations do.
    """
    known = {"dit": DiTConfig, "uvit": UViTConfig}
    architecture = content.get("architecture", "dit")
    if architecture not in known:
        raise ValueError(
            f"architecture is {architecture!r}, but it must be one of {', '.join(known)}: "
            f"{_advice(architecture, tuple(known))}"
        )
    config = known[architecture]
    names = tuple(field.name for field in fields(config))
    for name in content:
        if name not in names:
            raise ValueError(
                f"{name} is no field of a {architecture} model, which has {', '.join(names)}: "
                f"{_advice(name, names, cutoff=0.6)}"
            )
    return config(**content)


def _advice(name: str, known: tuple[str, ...], cutoff: float = 0.4) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return f"did you mean {nearest[0]!r}?" if nearest else "choose one of them"
