"""The recipe's sections on what is learned: [model] and [objective]."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from dit.config import UVIT_NAMES, DiTConfig, UViTConfig, config_from_dict, named_config

PositiveInt = Annotated[int, Gt(0)]
OPTIONS = ("qk_norm", "norm", "mlp", "position", "timestep_frequency_shift")
"""What a recipe's DiT may have otherwise than the paper's."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer: a named size, or its dimensions. The rest follows from the latents."""

    name: str | None = None
    """One of the papers' sizes, such as "DiT-S/2" or "U-ViT-S/2"."""
    architecture: Literal["dit", "uvit"] | None = None
    """Of a model given by its dimensions; "dit" when left out."""
    patch_size: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_ratio: Annotated[float, Gt(0)] = 4.0
    class_dropout_prob: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of labels replaced by the null class in training, which guidance needs."""
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = "adaln_zero"
    """DiT: how timestep and label reach the tokens."""
    qk_norm: bool | None = None
    """DiT: whether queries and keys pass an RMS norm; not when left out, as in the paper."""
    norm: Literal["layer", "rms"] | None = None
    """DiT: the norm before every branch; "layer" when left out, as in the paper."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """DiT: the feed-forward branch; "gelu" when left out, as in the paper."""
    position: Literal["sincos", "rope"] | None = None
    """DiT: how patches know their place; "sincos" when left out, as in the paper."""
    timestep_frequency_shift: Literal[0, 1] | None = None
    """DiT: 1 for a model that diffusers runs without code of ours; 0 when left out, as in the official code."""

    def __post_init__(self) -> None:
        dimensions = self._dimensions()
        given = [name for name, value in dimensions.items() if value is not None]
        fixed = given if self.architecture is None else ["architecture", *given]
        if self.name is not None and fixed:
            raise ValueError(f"found name = {self.name!r} and {fixed[0]}; a named size fixes it: remove one of them")
        if self.name is None and len(given) < 4:
            absent = ", ".join(name for name in dimensions if name not in given)
            raise ValueError(f"found no name and no {absent}; expected a name such as 'DiT-S/2', or all four")
        foreign = [*self._options()] + (["conditioning"] if self.conditioning != "adaln_zero" else [])
        if self.is_uvit and foreign:
            raise ValueError(
                f"{foreign[0]}: found {getattr(self, foreign[0])!r} with a U-ViT, which has no {foreign[0]}; expected "
                f"a DiT: remove {foreign[0]}, or choose a DiT"
            )
        # Refuses an unknown name, and dimensions that do not fit one another, before there are latents.
        self.resolve(input_size=self.patch_size or 8, in_channels=4, num_classes=1, learn_sigma=not self.is_uvit)

    @property
    def is_uvit(self) -> bool:
        return self.name in UVIT_NAMES or self.architecture == "uvit"

    def _dimensions(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}

    def _options(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    def resolve(
        self, *, input_size: int | tuple[int, int], in_channels: int, num_classes: int, learn_sigma: bool
    ) -> DiTConfig | UViTConfig:
        """The model's full configuration, once the latents are known. Raises ValueError if they do not fit."""
        fields: dict[str, Any] = {
            "input_size": input_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "mlp_ratio": self.mlp_ratio,
            "class_dropout_prob": self.class_dropout_prob,
        }
        if not self.is_uvit:
            fields |= {"learn_sigma": learn_sigma, "conditioning": self.conditioning, **self._options()}
        if self.name is not None:
            return named_config(self.name, **fields)
        return config_from_dict({"architecture": self.architecture or "dit", **self._dimensions(), **fields})


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model learns: flow matching, or Gaussian diffusion as in the paper."""

    kind: Literal["flow", "diffusion"] = "diffusion"
    time: Literal["uniform", "logit_normal"] | None = None
    """Flow: how times are drawn; "uniform" when left out."""
    schedule: Literal["linear", "cosine", "scaled_linear"] | None = None
    """Diffusion: noise schedule; "linear" when left out."""
    prediction: Literal["eps", "x0", "v"] | None = None
    """Diffusion: what the network outputs; "eps" when left out."""
    variance: Literal["learned_range", "fixed_small", "fixed_large"] | None = None
    """Diffusion: the reverse variance; "learned_range" when left out."""
    weighting: Literal["none", "min_snr"] | None = None
    """Diffusion: weight of the squared error by timestep; "none" when left out, "min_snr" as in arXiv 2303.09556."""
    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    """Signal-to-noise ratio from which "min_snr" weighs no more; 5 when left out."""

    def __post_init__(self) -> None:
        of_diffusion = ("schedule", "prediction", "variance", "weighting", "min_snr_gamma")
        foreign = of_diffusion if self.kind == "flow" else ("time",)
        for name in foreign:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"found kind = {self.kind!r} and {name} = {getattr(self, name)!r}, which {self.kind} does not "
                    f"have: remove {name}, or change kind"
                )
        if self.min_snr_gamma is not None and self.weighting != "min_snr":
            raise ValueError(
                f'min_snr_gamma = {self.min_snr_gamma} without weighting = "min_snr", which alone reads it: set '
                "that, or remove min_snr_gamma"
            )

    @property
    def learn_sigma(self) -> bool:
        return self.kind == "diffusion" and (self.variance or "learned_range") == "learned_range"

    def settings(self) -> dict:
        """Arguments of the process's constructor: what was given, its defaults left to it."""
        return {name: value for name, value in asdict(self).items() if name != "kind" and value is not None}
