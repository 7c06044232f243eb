"""The recipe: one TOML file that describes a run from images to metrics, validated before any work starts.

Sections that configure the model and its training extend dataclasses of `dit`, which stand beside the code that they
configure. Defaults are those of the DiT paper (Peebles & Xie 2022, arXiv 2212.09748) where it has one.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Lt, MinLen

from cluster.credentials import refuse_credentials
from dit.config import RandomKind
from dit.sampler_names import SAMPLER_PROCESSES, fitting_samplers
from dit.schedule import power_ema_name
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.model import ModelConfig, ObjectiveConfig, PositiveInt
from pipelines.config.training import TrainConfig
from raydit.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where images come from and how they are cropped."""

    path: str
    """Folder, Parquet or tar file, table of labels, a URI of one of these (s3://, gs://, file://), hub id of a Hugging
    Face data set (OWNER/NAME or OWNER/NAME@REVISION), or "digits": the 1,797 digits that scikit-learn ships."""
    format: Literal["folder", "table", "parquet", "webdataset", "huggingface", "digits"] | None = None
    """Layout of `path`; recognised when left out."""
    split: Annotated[str, MinLen(1)] = "train"  # DEFAULT_SPLIT of pipelines.images.splits
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
    """"earlier": recognise splits, labels and image files as releases before this field did. When left out, it
    applies to an output whose latents or autoencoder were made of images that were read so."""
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
    """Seed of all stages, below 2^64: every random number is a function of it and of an index."""
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
        if self.seed >= 2**64:
            raise InvalidInput(f"seed: found {self.seed}", "a seed below 2^64", "lower seed")
        self._check_sampler()
        self._check_flow_time()
        self._check_variance()
        self._check_guidance()
        self._check_weights()
        if not self.encode.stores_moments:
            self.check_encoding_in_training()
        if self.autoencoder.train:
            self.autoencoder.train.check_image_size(self.images.size)

    def _check_sampler(self) -> None:
        kind, sampler = self.objective.kind, self.evaluate.sampler
        if kind not in SAMPLER_PROCESSES[sampler]:
            raise InvalidInput(
                f"evaluate.sampler: found {sampler!r}, a sampler for {' and '.join(SAMPLER_PROCESSES[sampler])}, with "
                f"objective.kind = {kind!r}",
                f"one of {', '.join(fitting_samplers(kind))}",
                "change evaluate.sampler",
            )
        if self.evaluate.time_shift is not None and kind != "flow":
            raise InvalidInput(
                f"evaluate.time_shift: found {self.evaluate.time_shift!r} with objective.kind = {kind!r}",
                "a flow, whose times it shifts",
                "remove evaluate.time_shift",
            )
        interval = self.evaluate.cfg_interval
        if interval is not None and kind == "flow" and interval[0] > 1:
            raise InvalidInput(
                f"evaluate.cfg_interval: found {list(interval)} with objective.kind = 'flow', whose times are from 0 "
                "(noise) to 1 (data), so that guidance is never on",
                "times in [0, 1]",
                "change evaluate.cfg_interval",
            )

    def _check_flow_time(self) -> None:
        if self.model.flow_time is not None and self.objective.kind != "flow":
            raise InvalidInput(
                f"model.flow_time: found {self.model.flow_time!r} with objective.kind = {self.objective.kind!r}",
                "a flow, whose times it turns around",
                'remove model.flow_time, or set objective.kind = "flow"',
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
        if self.evaluate.needs_null_class and self.model.condition_dropout_prob == 0:
            raise InvalidInput(
                f"evaluate.cfg_scale: found {self.evaluate.cfg_scale} with model.condition_dropout_prob = 0, although "
                "guidance needs a null class",
                "",
                "set evaluate.cfg_scale = 1.0, or model.condition_dropout_prob = 0.1, or evaluate.autoguidance",
            )

    def _check_weights(self) -> None:
        weights = ("ema", "raw", *map(power_ema_name, self.train.ema_sigma_rels))
        if self.evaluate.weights not in weights:
            raise InvalidInput(
                f"evaluate.weights: found {self.evaluate.weights!r}",
                f"one of {', '.join(weights)}",
                "change it, or add its width to train.ema_sigma_rels, which keeps further averages",
            )

    def check_encoding_in_training(self) -> None:
        """Raise InvalidInput for settings that a training cannot have which encodes its images."""
        if self.train.loading != "auto":
            raise InvalidInput(
                f"train.loading: found {self.train.loading!r} with encode.store = false, so that there are no moments "
                "to load",
                '"auto": training reads images and encodes them',
                "remove train.loading, or encode.store",
            )
        for name, dtype in (("train.dtype", self.train.dtype), ("encode.dtype", self.encode.dtype)):
            if dtype == "tf32":
                raise InvalidInput(
                    f"{name}: found 'tf32' with encode.store = false",
                    "float32 or bfloat16, because torch switches TF32 for the whole process, in which the autoencoder "
                    "and the transformer compute at the same time",
                    f"change {name}, or remove encode.store",
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
