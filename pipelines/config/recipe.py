"""The recipe: one TOML file that describes a run from images to metrics, validated before any work starts.

Sections that configure the model and its training extend dataclasses of `dit`, which stand beside the code that they
configure. Defaults are those of the DiT paper (Peebles & Xie 2022, arXiv 2212.09748) where it has one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal, Self

from annotated_types import Ge, Lt, MinLen

from cluster.credentials import refuse_credentials
from dit.config import SAMPLER_PROCESSES, RandomKind
from dit.schedule import power_ema_name
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.model import ModelConfig, ObjectiveConfig, PositiveInt
from pipelines.config.training import ComputeDtype, TrainConfig, WorkersConfig
from raydit.errors import InvalidInput

ExtractorName = Literal["efficientnet-lite0", "inception", "dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14"]
"""The keys of `evaluation.extractors`, which is slower to import than a recipe is to check; a test compares them."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where images come from and how they are cropped."""

    path: str
    """Folder, Parquet or tar file, table of labels, a URI of one of these (s3://, gs://, file://), hub id of a Hugging
    Face data set (OWNER/NAME or OWNER/NAME@REVISION), or "digits": the 1,797 digits that scikit-learn ships."""
    format: Literal["folder", "table", "parquet", "webdataset", "huggingface", "digits"] | None = None
    """Layout of `path`; recognised when left out."""
    split: Annotated[str, MinLen(1)] = "train"
    """Split to use of a data set whose folders or files are named after splits (train, validation, test); or "all"."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set that has several; its default one when left out."""
    image_column: str | None = None
    """Column with the images or their file names, or the suffix of images in a tar file; recognised when left out."""
    label_column: str | None = None
    """Column with the labels, or in a tar file their suffix or their field in .json; recognised when left out."""
    class_names: tuple[str, ...] = ()
    """Class names in the order of their labels; when left out, those of the data set, else its label names, sorted."""
    class_order: Literal["sorted", "numeric"] | None = None
    """Order of classes that nothing else orders: "numeric" sorts names by value where all are numbers, and leaves out
    numbers without images; "sorted" sorts names as text, and counts numbers from 0. When left out, "numeric", unless
    the output has latents or an autoencoder in the other order."""
    reading: Literal["earlier"] | None = None
    """"earlier": recognise splits, labels and image files as releases before this field did. When left out, so for an
    output whose latents or autoencoder were made of images that were read so."""
    size: PositiveInt = 256
    """Side of the square images that every stage works on, in pixels; 256 as in the DiT paper."""
    crop: Literal["adm", "resize"] = "adm"
    """"adm": resize the short side to `size`, then crop the centre (Dhariwal & Nichol 2021); "resize": squeeze to a
    square."""
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of images that are excluded from training by a hash of their keys; their scores are the real baseline."""
    classes: tuple[str, ...] = ()
    """Names of the classes whose images are used; all when left out. Classes keep the order that they have among all
    classes, in whatever order they are named here, and are numbered from 0."""
    validation: Annotated[str, MinLen(1)] | None = None
    """A separate set of held-out images, instead of the share `held_out`: a path, URI or hub id, all images of which
    are used, or the name of another split of the same data set. A usual name of a split, such as "test" or "val", is a
    split; anything else is a path if it exists or contains "/", else a split. All images of `path` are trained on."""

    def __post_init__(self) -> None:
        if repeated := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise InvalidInput(f"classes: found {repeated[0]!r} more than once", "each class once", "remove it")
        if self.validation is not None and self.held_out:
            raise InvalidInput(
                f"validation: found {self.validation!r} with held_out = {self.held_out:g}, so that two settings name "
                "the held-out images",
                "one of them",
                "set held_out = 0, or remove validation",
            )


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder: a pretrained one by `id`, or one that `[autoencoder.train]` trains on the recipe's images."""

    id: str | None = None
    """Diffusers folder, or hub id such as "stabilityai/sd-vae-ft-ema", with @REVISION for one version of it.

    Its class is one of AutoencoderKL, AutoencoderTiny, AutoencoderKLFlux2, AutoencoderDC and AutoencoderRAE.
    """
    train: AutoencoderTrainConfig | None = None
    """Settings of the autoencoder that is trained here and kept in output/autoencoder."""

    def __post_init__(self) -> None:
        if (self.id is None) == (self.train is None):
            found = "neither id nor" if self.id is None else "both id and"
            raise InvalidInput(
                f"found {found} [autoencoder.train]",
                "exactly one of them",
                "set id for a pretrained autoencoder, or [autoencoder.train] to train one",
            )


@dataclass(frozen=True, kw_only=True)
class AbsentAutoencoder(AutoencoderConfig):
    """The autoencoder of a recipe without [autoencoder], which some stages do not need. No artifact records it."""

    def __post_init__(self) -> None:
        """Check nothing: there is no autoencoder."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WorkersConfig):
    """Sampling and scoring. Defaults are those of the DiT paper's FID-50K without guidance."""

    num_samples: Annotated[int, Ge(2)] = 50_000
    """Images to sample. FID is biased by this number, so it is part of the metrics' names."""
    sampler: str = "ddpm"
    """Sampler: "ddpm", "ddim" or "dpmpp_2m" for diffusion, "euler" or "heun" for flow. A recipe for flow that leaves it
    out has "euler"."""
    sampling_steps: PositiveInt = 250
    """Steps of the sampler."""
    cfg_scale: Annotated[float, Ge(1)] = 1.0
    """Scale of classifier-free guidance; 1.0 means no guidance."""
    cfg_channels: PositiveInt | None = None
    """Number of latent channels that are guided; all when left out, 3 in the DiT paper's code."""
    cfg_interval: tuple[float, float] | None = None
    """Times between which guidance is on; always when left out."""
    labels: Literal["balanced", "random"] = "random"
    """How samples get their labels: drawn uniformly, or equally many of each class."""
    weights: str = "ema"
    """Weights that sample: "ema", "raw" (as trained), or "ema_0.05" and so on, for one of train.ema_sigma_rels."""
    extractor: ExtractorName = "inception"
    """Network whose features are compared; only scores with "inception" are called FID."""
    extractors: tuple[ExtractorName, ...] = ()
    """Several networks that score the same samples, each by the protocol of a run with it alone; `extractor` is then
    the first of them. `extractor` alone when left out."""
    extractor_weights: str | dict[ExtractorName, str] | None = None
    """Path of the extractor's weights; its published weights when left out. Of several extractors, a table of paths:
    { inception = "inception.pth" }."""
    reference: str | dict[ExtractorName, str] | None = None
    """Path or URI of reference statistics (.npz); those of the training images when left out. Of several extractors, a
    table as in `extractor_weights`."""
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
    best that samples through this autoencoder can be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in SAMPLER_PROCESSES:
            raise InvalidInput(
                f"sampler: found {self.sampler!r}", f"one of {', '.join(SAMPLER_PROCESSES)}", "change sampler"
            )
        if self.extractors:
            self._check_extractors()
            object.__setattr__(self, "extractor", self.extractors[0])

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


def path_for(extractor: ExtractorName, paths: str | Mapping[ExtractorName, str] | None) -> str | None:
    """Return the path for an extractor: its entry if `paths` is a table, and otherwise `paths` itself."""
    return paths.get(extractor) if isinstance(paths, Mapping) else paths


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run from images to metrics."""

    name: Annotated[str, MinLen(1)]
    """Name of the MLflow experiment."""
    output: Annotated[str, MinLen(1)]
    """Folder or URI (s3://, gs://, file://) of all results: autoencoder/, latents/, checkpoints/, evaluations/."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of all stages: every random number is a function of it and of an index."""
    random: RandomKind | None = None
    """"counter": training and sampling compute the random numbers of a whole batch on the device, by a counter-based
    generator (`dit.random`). When left out, each image has a generator of its own on the CPU, as in releases before
    this field. The two give different checkpoints and scores."""
    images: ImagesConfig
    """The images."""
    autoencoder: AutoencoderConfig
    """The autoencoder between images and latents."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """How images are encoded."""
    model: ModelConfig
    """The network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network learns."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the network is trained."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How checkpoints are sampled from and scored."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where runs are recorded."""

    def __post_init__(self) -> None:
        refuse_credentials(asdict(self))  # every artifact and run contains the recipe
        if self.random == "counter" and self.seed >= 2**64:
            raise InvalidInput(f"seed: found {self.seed} with random = 'counter'", "a seed below 2^64", "change seed")
        self._check_sampler()
        self._check_variance()
        self._check_guidance()
        self._check_weights()
        if self.autoencoder.train:
            self.autoencoder.train.check_image_size(self.images.size)

    def _check_sampler(self) -> None:
        process = SAMPLER_PROCESSES[self.evaluate.sampler]
        if process != self.objective.kind:
            fitting = ", ".join(name for name, fits in SAMPLER_PROCESSES.items() if fits == self.objective.kind)
            raise InvalidInput(
                f"evaluate.sampler: found {self.evaluate.sampler!r}, a sampler for {process}, with objective.kind = "
                f"{self.objective.kind!r}",
                f"one of {fitting}",
                "change evaluate.sampler",
            )

    def _check_variance(self) -> None:
        if self.model.is_uvit and self.objective.learn_sigma:
            found = "nothing, which means 'learned_range'," if self.objective.variance is None else "'learned_range'"
            raise InvalidInput(
                f"objective.variance: found {found} with a U-ViT, which does not learn sigma",
                "'fixed_small' or 'fixed_large'",
                "set one of them, or choose a DiT",
            )

    def _check_guidance(self) -> None:
        if self.evaluate.cfg_scale > 1 and self.model.condition_dropout_prob == 0:
            raise InvalidInput(
                f"evaluate.cfg_scale: found {self.evaluate.cfg_scale} with model.condition_dropout_prob = 0, although "
                "guidance needs a null class",
                "",
                "set evaluate.cfg_scale = 1.0, or model.condition_dropout_prob = 0.1",
            )

    def _check_weights(self) -> None:
        weights = ("ema", "raw", *map(power_ema_name, self.train.ema_sigma_rels))
        if self.evaluate.weights not in weights:
            raise InvalidInput(
                f"evaluate.weights: found {self.evaluate.weights!r}",
                f"one of {', '.join(weights)}",
                "change it, or add its width to train.ema_sigma_rels, which keeps further averages",
            )

    @property
    def latents(self) -> str:
        """Absolute path or URI of the latent data set."""
        from cluster import storage

        return storage.absolute(self.encode.output) if self.encode.output else self.folder("latents")

    @property
    def latents_held_out(self) -> str:
        """Absolute path or URI of the latents of the held-out images, a folder beside `latents`."""
        from cluster import storage

        folder, name = storage.split(self.latents)
        return storage.join(folder, f"{name}_held_out")

    @property
    def encodes_held_out(self) -> bool:
        """Whether held-out images are encoded as well: the recipe names images for validation, or validates."""
        return self.images.validation is not None or self.train.validate_every is not None

    def folder(self, name: str) -> str:
        """Return the absolute path or URI of a folder in the output; workers run in other working directories."""
        from cluster import storage

        return storage.join(storage.absolute(self.output), name)


def random_setting(config: Recipe) -> dict[str, RandomKind]:
    """Return the entry of identities and records for how random numbers are drawn; none where nothing is said."""
    return {} if config.random is None else {"random": config.random}
