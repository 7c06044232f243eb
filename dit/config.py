"""What a diffusion transformer and a sampler may be; needs no torch, so recipes are checked at once."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
ProcessKind = Literal["diffusion", "flow"]
Schedule = Literal["linear", "cosine", "scaled_linear"]
Prediction = Literal["eps", "x0", "v"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Weighting = Literal["none", "min_snr"]
TimeDensity = Literal["uniform", "logit_normal"]

TIMESTEP_FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding before its two linear layers."""

MODEL_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads of the four sizes. Source: Peebles & Xie 2022, table 1 (https://arxiv.org/abs/2212.09748)."""

MODEL_NAMES: tuple[str, ...] = tuple(f"DiT-{size}/{patch}" for size in MODEL_SIZES for patch in (2, 4, 8))
"""The twelve models of the paper; the number after the slash is the patch size."""

SAMPLER_PROCESSES: dict[str, ProcessKind] = {
    "ddpm": "diffusion",
    "ddim": "diffusion",
    "dpmpp_2m": "diffusion",
    "euler": "flow",
    "heun": "flow",
}
"""Every sampler's name and the kind of process that it integrates."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a diffusion transformer; the defaults are DiT-XL/2 on 256 px ImageNet latents.

    Source: Peebles & Xie 2022 (https://arxiv.org/abs/2212.09748).
    Raises ValueError when fields do not fit together.
    """

    input_size: int | tuple[int, int] = 32
    """Height and width of the latents, in latent pixels; one number means a square."""
    patch_size: int = 2
    """Side of the square patch that becomes one token, in latent pixels."""
    in_channels: int = 4
    """Channels of the latents."""
    hidden_size: int = 1152
    """Width of the tokens; a multiple of num_heads and of 4."""
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
    learn_sigma: bool = True
    """Whether a second set of channels is predicted, for the variance "learned_range" of a diffusion."""
    conditioning: Conditioning = "adaln_zero"
    """How timestep and label reach the tokens: one of the four block designs of the paper's section 3.2."""
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
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but it must be a multiple of num_heads {self.num_heads} "
                "and of 4 (two sines and two cosines per position): change hidden_size or num_heads"
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
        known = get_args(Conditioning)
        if self.conditioning not in known:
            raise ValueError(
                f"conditioning is {self.conditioning!r}, but it must be one of {', '.join(known)}: "
                f"{_advice(self.conditioning, known)}"
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
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: twice in_channels when sigma is learned."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    @property
    def null_class(self) -> int | None:
        """Label that stands for "no label", or None when the model has none."""
        return self.num_classes if self.num_classes > 0 and self.class_dropout_prob > 0 else None


def named_config(name: str, **overrides: Any) -> DiTConfig:
    """The configuration of one of MODEL_NAMES, with fields of DiTConfig replaced by overrides.

    Raises ValueError for an unknown name, and as DiTConfig does.
    """
    if name not in MODEL_NAMES:
        raise ValueError(
            f"model name is {name!r}, but it must be one of {', '.join(MODEL_NAMES)}: {_advice(name, MODEL_NAMES)}"
        )
    size, patch = name.removeprefix("DiT-").split("/")
    fields: dict[str, Any] = {**MODEL_SIZES[size], "patch_size": int(patch), **overrides}
    return DiTConfig(**fields)


def forward_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one forward pass on one image; FLOPs are twice this number.

    Counts matrix products (linear layers, attention, patch projection), not element-wise work. The
    "Gflops" printed in Peebles & Xie 2022 are these multiply-accumulates: 118.6 G for DiT-XL/2.
    A training step costs three forward passes: 6 * forward_macs FLOPs per image.
    """
    width, tokens, mlp = config.hidden_size, config.num_tokens, config.mlp_size
    num_conditions = 1 if config.num_classes == 0 else 2  # timestep, label
    block_tokens = tokens + num_conditions if config.conditioning == "in_context" else tokens
    self_attention = 4 * block_tokens * width**2 + 2 * block_tokens**2 * width
    feed_forward = 2 * block_tokens * width * mlp
    conditioning = {
        "adaln_zero": 6 * width**2,
        "adaln": 4 * width**2,
        "cross_attention": 2 * (tokens + num_conditions) * width**2 + 2 * tokens * num_conditions * width,
        "in_context": 0,
    }[config.conditioning]
    final_modulation = 2 * width**2 if config.conditioning in ("adaln_zero", "adaln") else 0
    patch_area = config.patch_size**2
    ends = tokens * width * patch_area * (config.in_channels + config.out_channels)
    timestep_mlp = TIMESTEP_FREQUENCIES * width + width**2
    blocks = config.depth * (self_attention + feed_forward + conditioning)
    return blocks + final_modulation + ends + timestep_mlp


def _advice(name: str, known: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return f"did you mean {nearest[0]!r}?" if nearest else "choose one of them"
