"""The recipe's settings of workers, which every stage has, and of training."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from cluster.placement import WorkerNeeds, parse_label_condition
from dit.schedule import TrainingConfig
from pipelines.config.defaults import leave_out_defaults
from pipelines.config.lora import LoraConfig
from pipelines.config.model import PositiveInt
from pipelines.config.start import StartConfig
from raydit.errors import InvalidInput

ComputeDtype = Literal["float32", "tf32", "bfloat16"]
"""Precision of a network; see `dit.precision`."""
MatmulFormat = Literal["float8"]
"""Number format of matrix products beside that of `ComputeDtype`; see `dit.float8`."""
Strategy = Literal["ddp", "fsdp"]
LoadingBackend = Literal["memory", "memmap", "stream"]

VALIDATION = "validation/"
"""Prefix of the validation losses among metrics."""

LENGTH_FIELDS = ("steps", "extension", "earlier_ends")
"""Settings of training that may change when it continues after its end; checkpoints record them in their recipe."""

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
    "validate_every",
)
"""Settings of training that change trained weights by rounding at most, so that they may differ when it resumes."""

VALIDATION_BATCH = 64
"""Images of a forward pass of validation, whatever the batch of training: another size would change the last bits."""

RATE_DEFAULTS: dict[str, Any] = {"lr_multipliers": {}, "layer_decay": 1.0}
"""Values of fields of [train] that apply when they are left out: one learning rate for all parameters."""


@dataclass(frozen=True, kw_only=True)
class ElasticWorkersConfig:
    """The worker processes of a stage, whose number may vary between two bounds, and the resources of each."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of worker processes; or [fewest, most]: the stage continues without workers that are lost, and takes new
    ones when there is room for them."""
    cpus_per_worker: PositiveInt = 1
    """CPU threads of each worker. No identity includes it, but results are bit-equal only for equal values."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs of each worker, which computes on one of them; 0 computes on the CPU. Several workers of a training cannot
    share a GPU."""
    accelerator_type: str | None = None
    """Kind of GPU that the workers' nodes must have, by Ray's name, such as "H100" or "L4"; any when left out."""
    label_selector: dict[str, str] | None = None
    """Labels that the workers' nodes must have, such as {"ray.io/market-type" = "spot"}; "!value", "in(a, b)" and
    "!in(a, b)" are conditions too. Any node when left out."""

    def __post_init__(self) -> None:
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise InvalidInput(
                f"accelerator_type: found {self.accelerator_type!r} with gpus_per_worker = 0, which uses the CPU",
                "",
                "set gpus_per_worker = 1, or remove accelerator_type",
            )
        for key, condition in (self.label_selector or {}).items():
            parse_label_condition(key, condition)

    @property
    def fewest_workers(self) -> int:
        """Smallest number of workers with which the stage can run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Largest number of workers that the stage uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def placement(self) -> dict[str, Any]:
        """Conditions on the workers' nodes as keyword arguments of Ray's calls; fields that are left out are absent."""
        given = {"accelerator_type": self.accelerator_type, "label_selector": self.label_selector}
        return {name: value for name, value in given.items() if value}

    @property
    def needs(self) -> WorkerNeeds:
        """What a node must have for one of the workers."""
        return WorkerNeeds(cpus=self.cpus_per_worker, gpus=self.gpus_per_worker, **self.placement)


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(ElasticWorkersConfig):
    """The worker processes of a stage with a fixed number of them, and the resources of each."""

    num_workers: PositiveInt = 1
    """Number of worker processes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig, ElasticWorkersConfig):
    """The training loop, its workers, and which checkpoints are kept."""

    start: StartConfig | None = None
    """Checkpoint that training starts from; random weights when left out."""
    lora: LoraConfig | None = None
    """Low-rank adapter of the start that is trained instead of its weights, by peft; all weights are trained when left
    out."""
    lr_multipliers: dict[str, Annotated[float, Gt(0)]] | None = None
    """Factors of the learning rate by globs over names of parameters, as in start.freeze, such as
    { "final_layer.*" = 10.0 }; a parameter that several match has their product. All train at one rate when left
    out."""
    layer_decay: Annotated[float, Gt(0), Le(1)] | None = None
    """Factor of the learning rate from each block to the one before it (arXiv 2106.08254); the final layer and the
    embeddings of timesteps and labels train at the full rate. No decay when left out."""
    strategy: Strategy = "ddp"
    """"ddp": every worker holds the full model; "fsdp": the model is sharded over the workers (FSDP2), for models that
    do not fit on one GPU. Weights are gathered in float32 whatever the dtype; with "bfloat16" each GPU also keeps a
    bfloat16 copy of all of them for the backward pass, unless gradient_checkpointing is set. With accumulation_steps
    above 1 each holds the gradients of all parameters until the last micro-batch of a step."""
    dtype: ComputeDtype = "float32"
    """"bfloat16": the network computes under autocast; weights, losses and averages stay float32. "tf32": its matrix
    products use TF32 on GPUs that have it, and float32 elsewhere."""
    matmul: MatmulFormat | None = None
    """"float8": the products of attention and MLP compute in float8, all else in dtype = "bfloat16"; faster for wide
    models with compile = true. It needs an NVIDIA GPU of compute capability 8.9 (Ada, Hopper) and the extra `fp8`."""
    compile: bool = False
    """Compile the network's blocks, one for all of its kind: about half a minute at the start of each worker, whatever
    the depth, then faster steps."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and recompute the rest: less memory for about a third more
    time."""
    loading: Literal["auto", LoadingBackend] = "auto"
    """How workers read latents: "memory" loads all of them into every worker, "memmap" maps one file for all workers of
    a node, "stream" reads shard by shard; "auto" chooses by size, and keeps a checkpoint's choice when it resumes."""
    shuffle_rows: PositiveInt = 16_384
    """Size of the shuffle buffer of "stream", in images; a worker holds twice as many in memory."""
    validate_every: PositiveInt | None = None
    """Steps between measurements of the loss on held-out latents, a divisor of checkpoint_every; also after the last
    step. None are measured when left out."""
    keep_last: PositiveInt | None = None
    """Number of newest checkpoints to keep; all when left out. Those that an alias of a registered model, an adapter
    or evaluate.autoguidance needs are kept, too."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint at a multiple of this number of steps."""
    keep_best: str | None = None
    """Also keep the checkpoint that is best by this metric of its evaluations, such as "fid_50k", or by its
    "validation/loss"."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What happens to a batch whose loss or gradient is not finite: "skip" leaves it out and logs it, "stop" ends
    training."""
    max_skipped: PositiveInt = 3
    """Consecutive skipped batches after which training rolls back to the last checkpoint and continues with the batches
    that follow the skipped ones."""
    sample_every: Annotated[int, Ge(0)] = 0
    """Steps between sample grids, a multiple of checkpoint_every; 0 draws none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ElasticWorkersConfig.__post_init__(self)
        leave_out_defaults(self, RATE_DEFAULTS)
        if isinstance(self.num_workers, int):
            check_batch_divides(self, self.num_workers)
        else:
            self._check_elastic_workers()
        if self.matmul == "float8":
            self._check_float8()
        if self.lora is not None:
            self._check_lora()
        if self.sample_every % self.checkpoint_every:
            raise InvalidInput(
                f"sample_every: found {self.sample_every}",
                f"0 or a multiple of checkpoint_every = {self.checkpoint_every}, because samples are drawn from "
                "checkpoints",
                "change sample_every or checkpoint_every",
            )
        if self.validate_every and self.checkpoint_every % self.validate_every:
            raise InvalidInput(
                f"validate_every: found {self.validate_every}",
                f"a divisor of checkpoint_every = {self.checkpoint_every}, so that each has a loss",
                "change validate_every or checkpoint_every",
            )
        if (self.keep_best or "").startswith(VALIDATION) and not self.validate_every:
            raise InvalidInput(
                f"keep_best: found {self.keep_best!r} without validate_every, so that no validation loss is measured",
                "",
                "set validate_every, or choose a metric of evaluations",
            )
        if self.keep_last is None and (kept := self.keep_every or self.keep_best):
            name = "keep_every" if self.keep_every else "keep_best"
            raise InvalidInput(
                f"{name}: found {kept!r} without keep_last, so that every checkpoint is kept",
                "",
                f"set keep_last, or remove {name}",
            )

    @property
    def defaults(self) -> dict[str, Any]:
        """What the optional fields of the identity mean where they are left out."""
        return RATE_DEFAULTS | ({} if self.lora is None else {"lora": self.lora.defaults})

    def writes_checkpoint(self, step: int) -> bool:
        """Return whether a training with these settings writes a regular checkpoint of a step, if it begins anew."""
        if step == 0:
            return self.start is not None
        return step == self.steps or (step < self.steps and step % self.checkpoint_every == 0)

    def _check_lora(self) -> None:
        if self.start is None:
            raise InvalidInput(
                "lora: found without start, so that there is no base that an adapter could change",
                "",
                "add [train.start] with the checkpoint of the base, or remove [train.lora]",
            )
        if self.start.freeze:
            raise InvalidInput(
                f"lora: found with start.freeze = {list(self.start.freeze)}, although an adapter's base is frozen "
                "anyway",
                "",
                "remove start.freeze, or [train.lora]",
            )
        if self.matmul is not None:
            raise InvalidInput(
                f"lora: found with matmul = {self.matmul!r}, for which the layers of adapters are not made",
                "",
                "remove matmul, or [train.lora]",
            )

    def _check_elastic_workers(self) -> None:
        """Raise InvalidInput unless every micro-batch of every worker has an image, however many workers there are."""
        if not self.fewest_workers <= self.most_workers <= self.global_batch_size // self.accumulation_steps:
            times = " / accumulation_steps" if self.accumulation_steps > 1 else ""
            most = self.global_batch_size // self.accumulation_steps
            raise InvalidInput(
                f"num_workers: found {list(self.num_workers)}",  # type: ignore[arg-type]
                f"[fewest, most] with fewest <= most <= global_batch_size{times} = {most}",
                "change num_workers, or raise global_batch_size",
            )

    def _check_float8(self) -> None:
        if self.dtype != "bfloat16":
            # A product in float8 returns bfloat16. What is between products would take twice the memory traffic in a
            # wider dtype, for digits that the next product rounds away.
            raise InvalidInput(
                f"matmul: found 'float8' with dtype = {self.dtype!r}",
                'dtype = "bfloat16", the precision of all that is not a product in float8',
                'set train.dtype = "bfloat16", or remove train.matmul',
            )
        if not self.gpus_per_worker:
            raise InvalidInput(
                "matmul: found 'float8' with gpus_per_worker = 0, which uses the CPU",
                "an NVIDIA GPU of compute capability 8.9 or later for each worker",
                "set train.gpus_per_worker = 1, or remove train.matmul",
            )


def require_own_gpus(workers: ElasticWorkersConfig, section: str) -> None:
    """Raise InvalidInput if several workers of a training are to share a GPU, which NCCL refuses.

    section: the stage's table in the recipe. Not a check of the settings themselves, because recipes that were recorded
    with them must open.
    """
    if isinstance(workers, TrainingConfig) and workers.most_workers > 1 and 0 < workers.gpus_per_worker < 1:
        raise InvalidInput(
            f"{section}.gpus_per_worker: found {workers.gpus_per_worker:g} for each of {workers.most_workers} workers",
            "a GPU for each worker of a training, because NCCL refuses workers that share one",
            f"set {section}.gpus_per_worker = 1, or {section}.num_workers = 1",
        )


def check_batch_divides(config: TrainingConfig, num_workers: int) -> None:
    """Raise InvalidInput if the global batch cannot be divided into micro-batches of equal size."""
    if config.global_batch_size % (num_workers * config.accumulation_steps):
        steps = f" * accumulation_steps = {config.accumulation_steps}" if config.accumulation_steps > 1 else ""
        raise InvalidInput(
            f"global_batch_size: found {config.global_batch_size}",
            f"a multiple of num_workers = {num_workers}{steps}",
            "change one of them",
        )
