"""The recipe's section about sampling and scoring: [evaluate]."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, MinLen

from dit.sampler_names import SAMPLER_PROCESSES, SdeDiffusion
from dit.time_shift import TimeShift
from evaluation.features.extractor_names import INCEPTION, NETWORKS, check_distinct, extractor_kind
from evaluation.metric_names import check_metric_part
from pipelines.config.model import PositiveInt
from pipelines.config.training import ComputeDtype, WorkersConfig
from raydit.errors import InvalidInput

FurtherMetric = Literal["cmmd", "mind", "rbf_mmd"]
"""Metrics that are computed where a recipe asks for them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WorkersConfig):
    """Sampling and scoring. Defaults are those of the DiT paper's FID-50K without guidance."""

    num_samples: Annotated[int, Ge(2)] = 50_000
    """Images to sample. FID is biased by this number, so it is part of the metrics' names."""
    sampler: str = "ddpm"
    """Sampler: "ddpm", "ddim" or "dpmpp_2m" for diffusion; "euler", "heun", "sde" or "dpmpp_2m" for flow. A recipe for
    flow that leaves it out has "euler"."""
    sampling_steps: PositiveInt = 250
    """Steps of the sampler; "sde" takes 2 or more."""
    time_shift: Annotated[float, Gt(0)] | TimeShift | None = None
    """Flow only: factor a by which the sampler's times are shifted: a noise level sigma becomes
    a sigma / (1 + (a - 1) sigma). A number, "sd3" (3), "dimension" (sqrt(C H W / 4096)) or "flux" (from the number of
    tokens). No shift when left out, whatever objective.time_shift says."""
    sde_diffusion: SdeDiffusion | None = None
    """Sampler "sde" only: how much noise its steps add by time; "sigma" (1 - t) when left out, as in SiT."""
    sde_norm: Annotated[float, Gt(0)] | None = None
    """Sampler "sde" only: factor of sde_diffusion; 1 when left out, as in SiT."""
    cfg_scale: Annotated[float, Ge(1)] = 1.0
    """Scale of classifier-free guidance; 1.0 means no guidance."""
    cfg_channels: PositiveInt | None = None
    """Number of latent channels that are guided; all when left out, 3 in the DiT paper's code."""
    cfg_interval: tuple[float, float] | None = None
    """Times between which guidance is on, as the model counts them: from 0 (clean) to 999 (noise) for diffusion, from 0
    (noise) to 1 (data) for flow. Always when left out."""
    autoguidance: Annotated[str, MinLen(1)] | None = None
    """Checkpoint of a smaller or less trained model that guides instead of the null class, by cfg_scale, in every form
    that `raydit evaluate` takes. Its digest is part of the protocol."""
    autoguidance_model: str | None = None
    """Published size of the guiding model, such as "DiT-S/2", if autoguidance is an official weights file."""
    autoguidance_weights: str | None = None
    """Weights of the guiding checkpoint, as in `weights`, which is used when left out."""
    labels: Literal["balanced", "random"] = "random"
    """How samples get their labels: drawn uniformly, or equally many of each class."""
    weights: str = "ema"
    """Weights that sample: "ema", "raw" (as trained), or "ema_0.05" and so on, for one of train.ema_sigma_rels."""
    extractor: str = INCEPTION
    """Network whose features are compared; only scores with "inception" are called FID. "efficientnet-lite0" (offline),
    "efficientnet-lite1", "efficientnet-lite2", "inception", "dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14",
    "clip-vit-b-32", "clip-vit-l-14", "clip-vit-l-14-336px", a model "timm:NAME" or "transformers:ID" whose files are on
    this machine, or a function "MODULE:FUNCTION" from uint8 images (N, 3, H, W) to features (N, D)."""
    extractors: tuple[str, ...] = ()
    """Several networks that score the same samples, each by the protocol of a run with it alone; `extractor` is then
    the first of them. `extractor` alone when left out."""
    extractor_weights: str | dict[str, str] | None = None
    """Path of the extractor's weights; its published weights when left out. Of several extractors, a table of paths:
    { inception = "inception.pth" }."""
    reference: str | dict[str, str] | None = None
    """Path or URI of reference statistics (.npz); those of the training images when left out. Of several extractors, a
    table as in `extractor_weights`."""
    metrics: tuple[FurtherMetric, ...] = ()
    """Further metrics by every extractor: "cmmd" (by "clip-vit-l-14-336px" as published), "mind" (Monge Inception
    Distance), "rbf_mmd" (Gaussian kernel as wide as the median distance of the reference's images). They cost as much
    as precision and recall. None when left out."""
    per_class: bool | None = None
    """Whether the distance of each class's samples from its real images is reported as well. It is not when left
    out."""
    shard_rows: PositiveInt = 100
    """Images per shard, the unit in which samples are scored and scoring resumes."""
    batch_size: PositiveInt = 50
    """Images per forward pass of the sampler."""
    dtype: ComputeDtype = "float32"
    """Precision of the network, part of the protocol: "bfloat16" is autocast, "tf32" needs a GPU that has it. All else
    stays float32, as published figures are altogether."""
    decoder_dtype: ComputeDtype | None = None
    """Precision of the autoencoder's decoder for samples, part of the protocol; float32 when left out."""
    compile: bool = False
    """Compile the network's blocks, one for all of its kind: about half a minute at the start of each worker, whatever
    the depth, then faster. Images change only by the rounding of `dtype`, so the protocol does not include it."""
    reconstructions: bool | None = None
    """Whether held-out images that the autoencoder has encoded and decoded are scored as well, once for an output: the
    best that samples through this autoencoder can be. They are when left out; false leaves them out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in SAMPLER_PROCESSES:
            raise InvalidInput(
                f"sampler: found {self.sampler!r}", f"one of {', '.join(SAMPLER_PROCESSES)}", "change sampler"
            )
        self._check_sde()
        self._check_interval()
        self._check_autoguidance()
        self._check_names()
        if self.extractors:
            self._check_extractors()
            object.__setattr__(self, "extractor", self.extractors[0])

    def _check_sde(self) -> None:
        for name in ("sde_diffusion", "sde_norm") if self.sampler != "sde" else ():
            if getattr(self, name) is not None:
                found = f"{name}: found {getattr(self, name)!r} with sampler = {self.sampler!r}"
                raise InvalidInput(found, "the sampler 'sde', which alone reads it", f"remove {name}")
        if self.sampler == "sde" and self.sampling_steps < 2:
            found = f"sampling_steps: found {self.sampling_steps} with sampler = 'sde'"
            raise InvalidInput(found, "at least 2", "take more steps; SiT takes 250")

    def _check_interval(self) -> None:
        # Without guidance nothing reads it, and earlier recipes may have it.
        if self.cfg_scale > 1 and self.cfg_interval is not None and self.cfg_interval[0] > self.cfg_interval[1]:
            raise InvalidInput(f"cfg_interval: found {list(self.cfg_interval)}", "[low, high]", "swap the two numbers")

    def _check_autoguidance(self) -> None:
        if self.autoguidance is not None and self.cfg_scale == 1:
            found = f"autoguidance: found {self.autoguidance!r} with cfg_scale = 1, which is no guidance"
            raise InvalidInput(found, "a scale above 1", "set cfg_scale, such as 2.0, or remove autoguidance")
        for name in ("autoguidance_model", "autoguidance_weights") if self.autoguidance is None else ():
            if getattr(self, name) is not None:
                found = f"{name}: found {getattr(self, name)!r} without autoguidance"
                raise InvalidInput(found, "the checkpoint that it is of", f"set autoguidance, or remove {name}")

    @property
    def calls_per_sample(self) -> int:
        """How often the sampler calls the network for a sample; guidance takes a second pass in each call."""
        return self.sampling_steps * (2 if self.sampler == "heun" else 1)

    @property
    def functions(self) -> list[str]:
        """The extractors that are functions of the user's."""
        return [name for name in self.extractors or (self.extractor,) if extractor_kind(name) == "function"]

    @property
    def needs_null_class(self) -> bool:
        """Whether the model itself guides, by its null class."""
        return self.cfg_scale > 1 and self.autoguidance is None

    def _check_names(self) -> None:
        tables = {name: getattr(self, name) for name in ("extractor_weights", "reference")}
        named = {"extractor": (self.extractor,), "extractors": self.extractors}
        named |= {name: tuple(table) for name, table in tables.items() if isinstance(table, dict)}
        for field, names in named.items():
            try:
                for name in names:
                    if extractor_kind(name) == "function":
                        check_metric_part(name)
                check_distinct(names)
            except InvalidInput as error:
                raise InvalidInput(f"{field}: {error.found}", error.expected, error.do) from None
            others = {*names} - {self.extractor, *self.extractors, *NETWORKS}
            if field in tables and others:
                found = f"{field}: found a path for {min(others)!r}, by which nothing is scored"
                chosen = ", ".join(self.extractors or (self.extractor,))
                raise InvalidInput(found, f"paths for {chosen}", "correct or remove it")

    def _check_extractors(self) -> None:
        first, *others = self.extractors
        default = EvaluateConfig.extractor
        if self.extractor not in (default, first):
            raise InvalidInput(
                f"extractor: found {self.extractor!r} with extractors = {list(self.extractors)}",
                f"{first!r}, the first of them",
                "leave out extractor, or name it first in extractors, or set extractors = [] for it alone",
            )
        if len({*self.extractors}) <= len(others):
            raise InvalidInput(f"extractors: found {list(self.extractors)}", "each of them once", "remove the others")
        for name in ("extractor_weights", "reference"):
            if others and isinstance(path := getattr(self, name), str):
                raise InvalidInput(
                    f"{name}: found {path!r} with {len(self.extractors)} extractors",
                    "a table with a path for each extractor that needs one",
                    f'write it such as {name} = {{ {first} = "{path}" }}',
                )

    def for_each_extractor(self) -> list[Self]:
        """Return the settings of a run with each extractor alone, in order: with one extractor and paths of its own."""
        return [
            replace(
                self,
                extractor=name,
                extractors=(),
                extractor_weights=path_for(name, self.extractor_weights),
                reference=path_for(name, self.reference),
            )
            for name in self.extractors or (self.extractor,)
        ]


def path_for(extractor: str, paths: str | Mapping[str, str] | None) -> str | None:
    """Return the path for an extractor: its entry if `paths` is a table, and otherwise `paths` itself."""
    return paths.get(extractor) if isinstance(paths, Mapping) else paths
