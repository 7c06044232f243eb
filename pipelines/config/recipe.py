"""The recipe: one TOML file that describes a run from images to FID, validated before any work starts.

The sections of the mathematics (training loop, model) extend dataclasses that sit beside the code they
configure; the sections of the jobs are here. Field defaults are the paper's where the paper has one.
"""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt, MinLen

from cluster.credentials import refuse_credentials
from dit.config import SAMPLER_PROCESSES
from dit.schedule import power_ema_name
from pipelines.config.model import ModelConfig, ObjectiveConfig, PositiveInt
from pipelines.config.training import AutoencoderTrainConfig, TrainConfig, WorkersConfig


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where images come from and how they are cropped."""

    path: str
    """Folder, Parquet or tar file, table of labels, URI of one of them (s3://, gs://, file://), hub id of a Hugging
    Face data set (OWNER/NAME or OWNER/NAME@REVISION), or "digits": the 1,797 digits that scikit-learn ships."""
    format: Literal["folder", "table", "parquet", "webdataset", "huggingface", "digits"] | None = None
    """Layout of `path`; recognised when left out."""
    split: Annotated[str, MinLen(1)] = "train"
    """Part to take of a data set whose folders or files are named after parts (train, validation, test); or "all"."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set that has several; its default one when left out."""
    image_column: str | None = None
    """Column of the images or of their file names, in a tar their suffix; recognised when left out."""
    label_column: str | None = None
    """Column of the labels, in a tar their suffix or the field of .json; recognised when left out."""
    class_names: tuple[str, ...] = ()
    """Classes in the order of their numbers; when left out, as the data set says, else its label names, sorted."""
    size: PositiveInt = 256
    """Side of the square images that everything after sees, in pixels."""
    crop: Literal["adm", "resize"] = "adm"
    """"adm": short side to `size`, then centre crop (Dhariwal & Nichol 2021); "resize": squeeze to a square."""
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of images that nothing trains on, chosen by a hash of their keys; they give the metrics' real baseline."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder: a pretrained one by `id`, or one trained here by `[autoencoder.train]`."""

    id: str | None = None
    """Hub id or diffusers folder, such as "stabilityai/sd-vae-ft-ema"."""
    train: AutoencoderTrainConfig | None = None
    """Settings of the autoencoder trained here, kept in output/autoencoder."""

    def __post_init__(self) -> None:
        if (self.id is None) == (self.train is None):
            found = "neither" if self.id is None else "both"
            raise ValueError(
                f"found {found} of id and [autoencoder.train]; expected exactly one: an id for a pretrained "
                "autoencoder, or [autoencoder.train] to train one"
            )


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(WorkersConfig):
    """Images to latents."""

    output: str | None = None
    """Folder of the latents; `latents` in the recipe's output when left out. Recipes that share it encode once."""
    flip: bool = True
    """Store the moments of the mirrored image as well."""
    shard_rows: PositiveInt = 512
    """Images per Parquet file."""
    batch_size: PositiveInt = 32
    """Images per pass through the autoencoder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the autoencoder; results of bfloat16 can depend on the batch."""
    memory_format: Literal["contiguous", "channels_last"] = "channels_last"
    """Layout of the autoencoder's tensors; channels_last, as images lie, is the faster one on CPUs."""
    compile: bool = False
    """Compile the autoencoder's encoder: minutes at the start of each worker, then faster on a GPU."""
    max_quarantined: Annotated[float, Ge(0), Le(1)] = 0.05
    """Share of unusable images that stops the job; up to 10 of them never do, unless the share is 0."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WorkersConfig):
    """Sampling and scoring."""

    num_samples: Annotated[int, Ge(2)] = 50_000
    """Images to sample; FID is biased in it, so it is part of the metrics' names."""
    sampler: str = "ddpm"
    sampling_steps: PositiveInt = 250
    cfg_scale: Annotated[float, Ge(1)] = 1.0
    """Guidance scale; 1.0 is no guidance."""
    cfg_channels: PositiveInt | None = None
    """Latent channels that guidance changes; all when left out, 3 in the paper's code."""
    cfg_interval: tuple[float, float] | None = None
    """Times between which guidance acts; always when left out."""
    labels: Literal["balanced", "random"] = "random"
    weights: str = "ema"
    """Which weights sample: "ema", "raw" (as trained), or "ema_0.05" and so on, one of train.ema_sigma_rels."""
    extractor: Literal["efficientnet-lite0", "inception", "dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14"] = (
        "inception"
    )
    extractor_weights: str | None = None
    """Path of the extractor's weights; its own when left out."""
    reference: str | None = None
    """Reference statistics (.npz); those of the training images when left out."""
    shard_rows: PositiveInt = 100
    """Images per unit of work and of resuming."""
    batch_size: PositiveInt = 50
    """Images per pass through the sampler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16": the network computes under autocast, and its scores are of another protocol; all else stays
    float32."""
    compile: bool = False
    """Compile the network: a minute or more at the start of each worker, then faster. It moves images by the
    rounding of `dtype` only, so it is no part of the protocol."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in SAMPLER_PROCESSES:
            raise ValueError(f"sampler: found {self.sampler!r}, expected one of {', '.join(SAMPLER_PROCESSES)}")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run from images to metrics."""

    name: Annotated[str, MinLen(1)]
    """MLflow experiment."""
    output: Annotated[str, MinLen(1)]
    """Folder, or URI (s3://, gs://, file://), that holds autoencoder/ latents/ checkpoints/ evaluations/."""
    seed: Annotated[int, Ge(0)] = 0
    """Every random number of every stage is a function of it and of an index."""
    images: ImagesConfig
    autoencoder: AutoencoderConfig
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        refuse_credentials(asdict(self))  # every artifact and run shows it
        kind = SAMPLER_PROCESSES[self.evaluate.sampler]
        if kind != self.objective.kind:
            fitting = ", ".join(name for name, fits in SAMPLER_PROCESSES.items() if fits == self.objective.kind)
            raise ValueError(
                f"evaluate.sampler: found {self.evaluate.sampler!r}, a sampler for {kind}, with objective.kind = "
                f"{self.objective.kind!r}; expected one of {fitting}"
            )
        if self.model.is_uvit and self.objective.learn_sigma:
            found = "nothing, which means 'learned_range'," if self.objective.variance is None else "'learned_range'"
            raise ValueError(
                f"objective.variance: found {found} with a U-ViT, which does not learn sigma; expected 'fixed_small' "
                "or 'fixed_large': set one of them, or choose a DiT"
            )
        if self.evaluate.cfg_scale > 1 and self.model.class_dropout_prob == 0:
            raise ValueError(
                f"evaluate.cfg_scale: found {self.evaluate.cfg_scale} with model.class_dropout_prob = 0: guidance "
                "needs a null class. Set cfg_scale = 1.0, or class_dropout_prob = 0.1"
            )
        weights = ("ema", "raw", *map(power_ema_name, self.train.ema_sigma_rels))
        if self.evaluate.weights not in weights:
            raise ValueError(
                f"evaluate.weights: found {self.evaluate.weights!r}, expected one of {', '.join(weights)}; further "
                "averages are kept by train.ema_sigma_rels"
            )
        downsample = self.autoencoder.train.downsample if self.autoencoder.train else 1
        if self.images.size % downsample:
            raise ValueError(
                f"images.size: found {self.images.size}, expected a multiple of autoencoder.train.downsample = "
                f"{downsample}"
            )

    @property
    def latents(self) -> str:
        """Absolute path or URI of the latent data set."""
        from cluster import storage

        return storage.absolute(self.encode.output) if self.encode.output else self.folder("latents")

    def folder(self, name: str) -> str:
        """Absolute path or URI of one of the output's folders; workers run in other working directories."""
        from cluster import storage

        return storage.join(storage.absolute(self.output), name)
