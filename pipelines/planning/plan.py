"""What the stages of a recipe need and how long they take, before anything runs; starts no Ray and writes nothing.

Images, bytes, FLOPs and memory are counted from the recipe. Time follows from FLOPs and a device's speed, which is a
measured (rates) or assumed (hardware) share of its peak, measured by a warm-up on this machine (measure), or given by
the user.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dit.config import DiTConfig, UViTConfig
from dit.formats.record import head_label
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.recipe import Recipe
from pipelines.config.training import TrainConfig
from pipelines.latents.schema import moments_bytes
from pipelines.planning.hardware import Cluster, StageConfig, fit_workers, require_room
from pipelines.planning.memory import Memory, suggest_smaller, worker_memory
from pipelines.planning.networks import (
    Networks,
    checkpoint_bytes,
    count_parameters,
    trained_parameters,
)
from pipelines.planning.started_networks import resolve_started_networks
from pipelines.planning.time import VALIDATION, WORK, count_reconstructions
from pipelines.training.monitoring.retention import outdated_steps
from raydit.errors import InvalidInput, NotFound

DEFAULT_CLASSES = 1000
"""Classes of a recipe that names none, where its images are not listed: as many as ImageNet has."""

LEAST_SPEED = 1e-6
"""Images per second below which a measured speed is a mistake: an image in eleven days."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many images and classes a recipe has."""

    training: int
    held_out: int
    classes: int
    source: str
    """Where the numbers come from, in words."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs and how long it takes."""

    stage: str
    work: str
    """The amount of work, in words."""
    images: int
    """Images that the stage processes; a training counts those of every step."""
    flops: float
    workers: int
    memory: Memory
    """Bytes that one worker takes, by what they hold."""
    memory_limit: float
    """Bytes that one worker may take."""
    seconds: float
    limit: str
    """The part of the stage that takes most of the time."""
    basis: str
    """Where the speed comes from (measured, assumed or given), in words."""
    advice: str
    """What to change if a worker takes more memory than it may."""

    @property
    def memory_bytes(self) -> float:
        """Bytes that one worker takes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a worker takes no more memory than it may."""
        return not self.advice


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs from images to metrics if no stage has run yet."""

    name: str
    model: DiTConfig | UViTConfig
    model_name: str
    """One of the papers' sizes, such as "DiT-XL/2", or a description of the model's dimensions."""
    cluster: Cluster
    images: Images
    stages: list[StagePlan]
    latent_bytes: int
    """Bytes of all moments that are stored, with those of horizontal flips if there are any."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    checkpoints_written: int
    checkpoints_kept: int
    overrides: list[str]
    """Overrides of the recipe that the plan assumes, so that its workers use the cluster."""
    start: str = ""
    """In words, the checkpoint that training starts from, and the adapter; empty for random weights."""

    @property
    def seconds(self) -> float:
        """Seconds of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def dollars(self) -> float | None:
        """Price of all accelerators of the cluster for all stages; None where no price is known."""
        price = self.cluster.dollars_per_hour
        return self.seconds / 3600 * self.cluster.count * price if price else None


def make_plan(
    config: Recipe,
    cluster: Cluster,
    images: Images,
    *,
    keep: frozenset[str] = frozenset(),
    speeds: Mapping[str, float] | None = None,
) -> Plan:
    """Plan all stages of a recipe, with as many workers as the cluster has accelerators.

    keep: dotted fields that the user has set: numbers of workers among them do not change. speeds: measured images
    per second by stage, of all its workers together, which replace computed times. Raises NotFound for an unknown
    autoencoder, and InvalidInput for workers that need more accelerators than the cluster has, or for a start that no
    training can have.
    """
    networks, train = resolve_started_networks(config, images.classes), config.train
    stages: list[StagePlan] = []
    overrides: list[str] = []
    for section, (settings, count) in _stages(config, images).items():
        changes = fit_workers(settings, cluster, count)
        if f"{section}.num_workers" in keep:
            changes.pop("num_workers", None)
        overrides += [f"{section}.{name}={value:g}" for name, value in changes.items() if value is not None]
        fitting = replace(settings, **changes)
        require_room(section, fitting, cluster)
        stages.append(_plan_stage(section, fitting, networks, cluster, count, images.held_out, speeds or {}))
    model = networks.model
    moments_shape = (networks.moments_channels, *model.latent_size)
    family = "U-ViT" if isinstance(model, UViTConfig) else "DiT"
    label = config.model.name or f"{family} of width {model.hidden_size} and depth {model.depth}"
    regular = {*range(0, train.steps + 1, train.checkpoint_every), train.steps}
    steps = sorted(filter(train.writes_checkpoint, regular))
    return Plan(
        name=config.name,
        model=model,
        model_name=label + head_label(config.model.head_width, config.model.head_depth),
        cluster=cluster,
        images=images,
        stages=stages,
        latent_bytes=_stored(config, images) * moments_bytes(moments_shape, config.encode.flip),
        checkpoint_bytes=checkpoint_bytes(model, train),
        checkpoints_written=len(steps),
        checkpoints_kept=len(steps) - _count_removed(steps, config),
        overrides=overrides,
        start=_describe_start(train, model),
    )


def _count_removed(steps: list[int], config: Recipe) -> int:
    """Return how many of the checkpoints of some steps are removed in the end, if the best one is an earlier one."""
    removed = outdated_steps(steps, config.train, None)
    if config.evaluate.autoguidance is not None:
        from pipelines.scoring.samples.guide import own_guide_step  # imports torch

        guide = own_guide_step(config.evaluate, config.folder("checkpoints"))
        removed = [step for step in removed if step != guide]
    return len(removed) - bool(removed and config.train.keep_best)


def _describe_start(train: TrainConfig, model: DiTConfig | UViTConfig) -> str:
    if train.start is None:
        return ""
    parts = ""
    if train.lora is not None:
        parts = f", and trains an adapter of rank {train.lora.chosen_rank} alone"
    elif train.start.freeze:
        parts = f": {trained_parameters(model, train):,} of {count_parameters(model).total:,} parameters are trained"
    return train.start.describe() + parts


def _encoded(config: Recipe, images: Images) -> int:
    """Return the number of images that are encoded: training images, and held-out ones if the recipe validates."""
    return images.training + (images.held_out if config.encodes_held_out else 0)


def _stored(config: Recipe, images: Images) -> int:
    """Return the number of images whose moments are stored: those that are encoded, unless training encodes its own."""
    return _encoded(config, images) - (0 if config.encode.stores_moments else images.training)


def _stages(config: Recipe, images: Images) -> dict[str, tuple[StageConfig, int]]:
    """Return the settings of each stage with the images that it processes, by its table in the recipe."""
    own, train, evaluate = config.autoencoder.train, config.train, config.evaluate
    # Features are needed of the held-out images and, unless reference statistics are given, of the training images.
    are_given = all(each.reference for each in evaluate.for_each_extractor())
    real_images = _count_baseline(evaluate, images.held_out) + (0 if are_given else images.training)
    scored = evaluate.num_samples + real_images + count_reconstructions(evaluate, images.held_out)
    return {
        **({"autoencoder.train": (own, own.steps * own.global_batch_size)} if own else {}),
        "encode": (config.encode, _encoded(config, images)),
        "train": (train, train.steps * train.global_batch_size),
        "evaluate": (evaluate, scored),
    }


def _count_baseline(settings: EvaluateConfig, held_out: int) -> int:
    """Return how many held-out images have features: all, or of very many as many as there are samples."""
    if held_out <= settings.num_samples:
        return held_out
    from pipelines.scoring.real_images.references import MAX_HELD_OUT_FEATURES  # in here, because it takes a second

    return held_out if held_out <= MAX_HELD_OUT_FEATURES else settings.num_samples


def _plan_stage(
    section: str,
    settings: StageConfig,
    networks: Networks,
    cluster: Cluster,
    images: int,
    held_out: int,
    speeds: Mapping[str, float],
) -> StagePlan:
    """Plan one stage with the workers of its settings.

    section: the stage's table in the recipe. held_out: images that nothing trains on.
    """
    stage = section.partition(".")[0]
    held_out_images = {"held_out": held_out} if stage in ("train", "evaluate") else {}
    work = WORK[stage](settings, networks, cluster, images, **held_out_images)
    if speed := speeds.get(stage):
        validation = {name: seconds for name, seconds in work.seconds.items() if name == VALIDATION}
        seconds = {"as given": images / speed} | validation
        work = work._replace(seconds=seconds, basis=_describe_given(speed, settings.most_workers))
    memory, limit = worker_memory(settings, networks, cluster), cluster.worker_bytes(settings)
    fits = sum(memory.values()) <= limit
    return StagePlan(
        stage=stage,
        work=work.description,
        images=images,
        flops=work.flops,
        workers=settings.most_workers,
        memory=memory,
        memory_limit=limit,
        seconds=sum(work.seconds.values()),
        limit=max(work.seconds, key=lambda part: work.seconds[part]),
        basis=work.basis,
        advice="" if fits else suggest_smaller(section, settings, networks, cluster),
    )


def count_images(config: Recipe, count: int | None, classes: int | None = None) -> Images:
    """Return how many images a recipe has: `count` if given, else those that its source lists.

    classes: their number, if count is given; when left out those that the recipe names, else DEFAULT_CLASSES. Raises
    NotFound if there is neither a count nor a source, and InvalidInput for another number of classes than the recipe
    names.
    """
    if count is not None:
        held_out = round(count * config.images.held_out)
        uncounted = "; the images of images.validation are not counted" if config.images.validation is not None else ""
        return Images(
            training=count - held_out,
            held_out=held_out,
            classes=_count_classes(config, classes),
            source=f"as given by --images{uncounted}",
        )
    from pipelines.images.held_out import split_images
    from pipelines.latents.recorded_images import list_images

    try:
        listed, images = list_images(config)
        training, others = split_images(listed.images, images)
    except FileNotFoundError as error:
        raise NotFound(str(error), "", "To plan without the images, give their number: --images 1281167") from None
    source = f"in {config.images.path}"
    return Images(training=len(training), held_out=len(others), classes=len(training.class_names), source=source)


def _count_classes(config: Recipe, given: int | None) -> int:
    """Return how many classes a recipe has whose images are not listed. given: the number that the user has given."""
    field = "images.classes" if config.images.classes else "images.class_names"
    named = len(config.images.classes or config.images.class_names)
    if named and given not in (None, named):
        raise InvalidInput(
            f"--classes: found {given} with {field}, which names {named}", f"{named}", "leave out --classes"
        )
    return named or (DEFAULT_CLASSES if given is None else given)


def _describe_given(speed: float, workers: int) -> str:
    """Return a speed that the user has measured, in words: of all workers of its stage together."""
    return f"given: {speed:,g} images/s for {f'all {workers} workers together' if workers > 1 else 'its one worker'}"


def parse_speeds(measured: tuple[str, ...]) -> dict[str, float]:
    """Return images per second by stage, of all its workers together, from texts such as "train=812".

    Raises InvalidInput for another form, and for a speed by which no stage ends, or that is not finite.
    """
    speeds = {}
    for text in measured:
        stage, _, number = (part.strip() for part in text.partition("="))
        try:
            speeds[stage] = float(number)
        except ValueError:
            speeds[stage] = 0.0
        if stage not in WORK or not LEAST_SPEED <= speeds[stage] < math.inf:
            raise InvalidInput(
                f"--measured: found {text!r}",
                "STAGE=IMAGES_PER_SECOND of all workers of the stage together, such as train=812",
                f"The stages are {', '.join(WORK)}",
            )
    return speeds
