"""The recipe's sections on training, and what every stage says of its workers."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from cluster.placement import parse_label_condition
from dit.schedule import TrainingConfig
from pipelines.config.model import PositiveInt

NON_IDENTITY_FIELDS = (
    "accumulation_steps",
    "checkpoint_every",
    "log_every",
    "num_workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "accelerator_type",
    "label_selector",
    "strategy",
    "compile",
    "gradient_checkpointing",
    "loading",
    "shuffle_rows",
    "keep_last",
    "keep_every",
    "keep_best",
    "on_nonfinite",
    "max_skipped",
    "sample_every",
)
"""Settings of training that trained weights do not depend on, but for rounding: they may change on the way."""


@dataclass(frozen=True, kw_only=True)
class ElasticWorkersConfig:
    """How many processes a stage gets, perhaps between two numbers, and what each of them holds."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Processes; or [fewest, most]: lost ones are done without, and taken back when they return."""
    cpus_per_worker: PositiveInt = 1
    """CPU threads of each; part of nothing's identity, but results are bit-equal only for equal values."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs of each; 0 computes on the CPU."""
    accelerator_type: str | None = None
    """Kind of GPU that their nodes must have, by Ray's name, such as "H100" or "L4"; any when left out."""
    label_selector: dict[str, str] | None = None
    """Labels that their nodes must have, such as {"ray.io/market-type" = "spot"}; "!value", "in(a, b)" and "!in(a, b)"
    are conditions too. Any node when left out."""

    def __post_init__(self) -> None:
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise ValueError(
                f"accelerator_type: found {self.accelerator_type!r} with gpus_per_worker = 0, which computes on the "
                "CPU; set gpus_per_worker = 1, or remove accelerator_type"
            )
        for key, condition in (self.label_selector or {}).items():
            parse_label_condition(key, condition)

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def placement(self) -> dict[str, Any]:
        """Where its workers may be, as Ray's calls take it; what is left out is in none of them."""
        given = {"accelerator_type": self.accelerator_type, "label_selector": self.label_selector}
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(ElasticWorkersConfig):
    """How many processes a stage gets, and what each of them holds."""

    num_workers: PositiveInt = 1
    """Processes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig, ElasticWorkersConfig):
    """The training loop, its workers, and what is kept of its checkpoints."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """"ddp": the whole model in every worker; "fsdp": divided over them (FSDP2), for one that no GPU holds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16": the network computes under autocast; weights, losses and averages stay float32."""
    compile: bool = False
    """Compile the network: a minute or more at the start of each worker, then faster steps."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for backward and compute the rest again: less memory for a third more time."""
    loading: Literal["auto", "memory", "memmap", "stream"] = "auto"
    """Where batches take latents from: every worker's memory, a file that a node's workers map, or shard by shard;
    "auto" chooses by size, and goes on as a checkpoint began."""
    shuffle_rows: PositiveInt = 16_384
    """Images among which those of a stream are shuffled; twice as many are held in memory."""
    keep_last: PositiveInt | None = None
    """Newest checkpoints to keep; all when left out."""
    keep_every: PositiveInt | None = None
    """Keep every checkpoint at a multiple of so many steps, beside the newest."""
    keep_best: str | None = None
    """Keep the checkpoint that is best by this metric of its evaluations, such as "fid_50k", beside the newest."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What becomes of a batch whose loss or gradient is not finite: it is left out and named, or training stops."""
    max_skipped: PositiveInt = 3
    """Batches left out in a row after which training goes back to the last checkpoint, with the batches after them."""
    sample_every: Annotated[int, Ge(0)] = 0
    """Steps between grids of samples, a multiple of checkpoint_every; 0 makes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ElasticWorkersConfig.__post_init__(self)
        if isinstance(self.num_workers, int):
            check_divides(self, self.num_workers)
        elif not self.fewest_workers <= self.most_workers <= self.global_batch_size:
            raise ValueError(
                f"num_workers: found {list(self.num_workers)}, expected [fewest, most] with fewest <= most <= "
                f"global_batch_size = {self.global_batch_size}"
            )
        if self.sample_every % self.checkpoint_every:
            raise ValueError(
                f"sample_every: found {self.sample_every}, expected 0 or a multiple of checkpoint_every = "
                f"{self.checkpoint_every}, because samples are drawn from checkpoints"
            )
        if self.keep_last is None and (kept := self.keep_every or self.keep_best):
            name = "keep_every" if self.keep_every else "keep_best"
            raise ValueError(
                f"{name}: found {kept!r} without keep_last, so that all are kept; set keep_last, or remove {name}"
            )


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig(TrainingConfig, WorkersConfig):
    """A small KL autoencoder for images that no pretrained one fits."""

    steps: PositiveInt = 400
    global_batch_size: PositiveInt = 32
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Ge(0)] = 30
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.99)
    grad_clip: Annotated[float, Ge(0)] = 1.0
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    ema_warmup: bool = True
    checkpoint_every: PositiveInt = 200
    log_every: PositiveInt = 20
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    downsample: Literal[2, 4, 8, 16, 32] = 4
    """Image pixels per latent pixel, along each side."""
    width: Annotated[int, Ge(8)] = 16
    """Channels at full resolution, a multiple of 8; the lower resolutions have twice as many."""
    kl_weight: Annotated[float, Ge(0)] = 1e-6
    """Weight of the KL term against the squared error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ElasticWorkersConfig.__post_init__(self)
        check_divides(self, self.num_workers)
        if self.width % 8:
            raise ValueError(f"width = {self.width}: expected a multiple of 8 (group normalisation has 8 groups)")


def check_divides(config: TrainingConfig, num_workers: int) -> None:
    """Every pass of every worker sees equally many images. Raises ValueError."""
    if config.global_batch_size % (num_workers * config.accumulation_steps):
        passes = f" * accumulation_steps = {config.accumulation_steps}" if config.accumulation_steps > 1 else ""
        raise ValueError(
            f"global_batch_size: found {config.global_batch_size}, expected a multiple of num_workers = {num_workers}"
            f"{passes}"
        )
