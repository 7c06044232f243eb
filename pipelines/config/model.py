"""The recipe's sections about what is learned: [model] and [objective]."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

from dit.config import (
    UVIT_NAMES,
    Architecture,
    Conditioning,
    DiTConfig,
    FlowTime,
    FrequencyShift,
    Mlp,
    Norm,
    Position,
    Prediction,
    ProcessKind,
    Schedule,
    TimeDensity,
    UViTConfig,
    Variance,
    Weighting,
    config_from_dict,
    named_config,
)
from dit.time_shift import TimeShift, shift_factor
from raydit.errors import InvalidInput

PositiveInt = Annotated[int, Gt(0)]

DIMENSIONS = ("patch_size", "hidden_size", "depth", "num_heads")
"""Fields that describe a model without a name; a recipe sets all four, or none."""

REFINEMENTS = (
    "qk_norm",
    "norm",
    "mlp",
    "position",
    "timestep_frequency_shift",
    "head_width",
    "head_depth",
    "flow_time",
)
"""Fields in which a recipe's DiT may differ from the paper's."""

UVIT_FIELDS = ("qkv_bias", "mlp_time_embed", "final_conv")
"""Fields in which a recipe's U-ViT may differ from its size."""

MODEL_DEFAULTS: dict[str, Any] = {
    "architecture": "dit",
    **{field.name: field.default for field in fields(DiTConfig) if field.name in REFINEMENTS},
    **{field.name: field.default for field in fields(UViTConfig) if field.name in ("qkv_bias", "mlp_time_embed")},
}
"""What the optional fields of [model] mean where they are left out. What final_conv means depends on the size."""

OBJECTIVE_DEFAULTS: dict[str, Any] = {
    "time": "uniform",
    "schedule": "linear",
    "prediction": "eps",
    "variance": "learned_range",
    "weighting": "none",
    "min_snr_gamma": 5.0,
}
"""What the optional fields of [objective] mean where they are left out, each with the kind that has it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer: a named size, or its dimensions. Its other dimensions follow from the latents."""

    name: str | None = None
    """One of the papers' sizes, such as "DiT-S/2" or "U-ViT-S/2"."""
    architecture: Architecture | None = None
    """Architecture of a model that is given by its dimensions; "dit" when left out."""
    patch_size: PositiveInt | None = None
    """Side of the square patch that becomes one token, in latent pixels."""
    hidden_size: PositiveInt | None = None
    """Width of the tokens."""
    depth: PositiveInt | None = None
    """Number of transformer blocks."""
    num_heads: PositiveInt | None = None
    """Attention heads of each block."""
    mlp_ratio: Annotated[float, Gt(0)] = 4.0
    """Hidden width of the MLP in multiples of hidden_size; 4 as in DiT and U-ViT."""
    class_dropout_prob: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of images whose conditions training replaces by the null class, which guidance needs; 0.1 as in the DiT
    paper. Recipes may call it condition_dropout_prob; it is recorded under the older name."""
    conditioning: Conditioning = "adaln_zero"
    """DiT only: how timestep and label reach the tokens; "adaln_zero" is the best of the paper's four designs."""
    qk_norm: bool | None = None
    """DiT only: whether queries and keys pass an RMS norm; false when left out, as in the paper."""
    norm: Norm | None = None
    """DiT only: the norm before every branch; "layer" when left out, as in the paper."""
    mlp: Mlp | None = None
    """DiT only: the feed-forward branch; "gelu" when left out, as in the paper."""
    position: Position | None = None
    """DiT only: how positions of patches are encoded; "sincos" when left out, as in the paper."""
    timestep_frequency_shift: FrequencyShift | None = None
    """DiT only: 1 for a model that diffusers runs without any of our code; 0 when left out, as in the official code."""
    head_width: PositiveInt | None = None
    """DiT only: width of a wide head after the blocks, for latents of more channels than hidden_size (arXiv 2510.11690,
    with 2048 and head_depth = 2 for 768 channels); a multiple of 128, or of 4 below. No head when left out."""
    head_depth: PositiveInt | None = None
    """DiT only: number of blocks of the wide head, with head_width. No head when left out."""
    flow_time: FlowTime | None = None
    """DiT for a flow only: "noise" for weights that count time from 0 (data) to 1 (noise), as REPA's do, so that a
    training can start from them. From 0 (noise) to 1 (data) when left out, as SiT's weights and all settings do."""

    qkv_bias: bool | None = None
    """U-ViT only: whether queries, keys and values have a bias; false when left out, as in the paper."""
    mlp_time_embed: bool | None = None
    """U-ViT only: whether the timestep embedding passes two linear layers before it becomes a token; false when left
    out, as in the paper."""
    final_conv: bool | None = None
    """U-ViT only: whether a 3x3 convolution follows the last linear layer; when left out as the named size has it, all
    but U-ViT-H, and true for a model that is given by its dimensions."""

    def __post_init__(self) -> None:
        dimensions = self._dimensions()
        given = [name for name, value in dimensions.items() if value is not None]
        fixed = given if self.architecture is None else ["architecture", *given]
        if self.name is not None and fixed:
            raise InvalidInput(
                f"name: found {self.name!r} together with {fixed[0]} = {getattr(self, fixed[0])!r}",
                "only one of them, because a named size fixes all dimensions",
                f"remove name, or {', '.join(fixed)}",
            )
        if self.name is None and len(given) < len(DIMENSIONS):
            absent = [name for name in DIMENSIONS if name not in given]
            raise InvalidInput(
                f"found no name and no {', '.join(absent)}",
                f"a name such as 'DiT-S/2', or all of {', '.join(DIMENSIONS)}",
                f"set name, or {', '.join(absent)}",
            )
        dit_fields = [*self._given(REFINEMENTS)] + (["conditioning"] if self.conditioning != "adaln_zero" else [])
        foreign = dit_fields if self.is_uvit else [*self._given(UVIT_FIELDS)]
        own, other = ("U-ViT", "DiT") if self.is_uvit else ("DiT", "U-ViT")
        if foreign:
            raise InvalidInput(
                f"{foreign[0]}: found {getattr(self, foreign[0])!r} with a {own}, which has no {foreign[0]}",
                f"a {other}",
                f"remove {foreign[0]}, or choose a {other}",
            )
        # Refuses an unknown name and dimensions that do not fit together before there are latents.
        self.resolve(input_size=self.patch_size or 8, in_channels=4, num_classes=1, learn_sigma=not self.is_uvit)

    @property
    def condition_dropout_prob(self) -> float:
        """Share of images whose conditions training replaces by the null ones."""
        return self.class_dropout_prob

    @property
    def is_uvit(self) -> bool:
        """Whether the model is a U-ViT; otherwise it is a DiT."""
        return self.name in UVIT_NAMES or self.architecture == "uvit"

    def _dimensions(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in DIMENSIONS}

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of those of some fields that are set."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def resolve(
        self, *, input_size: int | tuple[int, int], in_channels: int, num_classes: int, learn_sigma: bool
    ) -> DiTConfig | UViTConfig:
        """Return the model's full configuration for given latents. Raises InvalidInput if the two do not fit."""
        given: dict[str, Any] = {
            "input_size": input_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "mlp_ratio": self.mlp_ratio,
            "class_dropout_prob": self.class_dropout_prob,
        }
        if self.is_uvit:
            given |= self._given(UVIT_FIELDS)
        else:
            given |= {"learn_sigma": learn_sigma, "conditioning": self.conditioning, **self._given(REFINEMENTS)}
        if self.name is not None:
            return named_config(self.name, **given)
        return config_from_dict({"architecture": self.architecture or "dit", **self._dimensions(), **given})


@dataclass(frozen=True, kw_only=True)
class AbsentModel(ModelConfig):
    """The model of a recipe without [model], which some stages do not need. No artifact records it."""

    def __post_init__(self) -> None:
        """Check nothing: there are no dimensions."""

    def resolve(self, **latents: Any) -> DiTConfig | UViTConfig:
        """Raise InvalidInput: the section is needed after all."""
        raise InvalidInput("model: missing", "a section", "add [model] to the recipe, which this needs")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model learns: flow matching, or Gaussian diffusion as in the DiT paper."""

    kind: ProcessKind = "diffusion"
    """Process that the model learns to reverse; "diffusion" as in the DiT paper."""
    time: TimeDensity | None = None
    """Flow only: density from which times are drawn; "uniform" when left out."""
    time_shift: Annotated[float, Gt(0)] | TimeShift | None = None
    """Flow only: factor by which training's times are shifted towards noise: a number, or a rule, as in
    evaluate.time_shift, which is sampling's. No shift when left out."""
    schedule: Schedule | None = None
    """Diffusion only: noise schedule; "linear" when left out, as in the DiT paper."""
    prediction: Prediction | None = None
    """Diffusion only: what the network outputs; "eps" when left out, as in the DiT paper."""
    variance: Variance | None = None
    """Diffusion only: variance of the reverse process; "learned_range" when left out, as in the DiT paper."""
    weighting: Weighting | None = None
    """Diffusion only: weight of the squared error by timestep; "none" when left out, as in the DiT paper; "min_snr" as
    in arXiv 2303.09556."""
    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    """Signal-to-noise ratio above which "min_snr" does not raise the weight; 5 when left out, as in its paper."""

    def __post_init__(self) -> None:
        diffusion_only = ("schedule", "prediction", "variance", "weighting", "min_snr_gamma")
        foreign = diffusion_only if self.kind == "flow" else ("time", "time_shift")
        for name in foreign:
            if getattr(self, name) is not None:
                raise InvalidInput(
                    f"{name}: found {getattr(self, name)!r} with kind = {self.kind!r}, which has no {name}",
                    "",
                    f"remove {name}, or change kind",
                )
        if self.min_snr_gamma is not None and self.weighting != "min_snr":
            raise InvalidInput(
                f"min_snr_gamma: found {self.min_snr_gamma} without weighting = 'min_snr', which alone reads it",
                "",
                "set weighting = 'min_snr', or remove min_snr_gamma",
            )

    @property
    def learn_sigma(self) -> bool:
        """Whether the network predicts the variance as well, in a second set of channels."""
        return self.kind == "diffusion" and (self.variance or "learned_range") == "learned_range"

    def settings(self, model: DiTConfig | UViTConfig) -> dict[str, Any]:
        """Return the arguments of the process's constructor: only fields that the recipe sets.

        model: to be trained; a rule for time_shift becomes a number by its latents or tokens.
        """
        settings = {name: value for name, value in asdict(self).items() if name != "kind" and value is not None}
        if self.time_shift is not None:
            shape = (model.in_channels, *model.latent_size)
            settings["time_shift"] = shift_factor(self.time_shift, shape, model.num_tokens)
        return settings
