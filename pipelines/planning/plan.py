"""What the stages of a recipe need and how long they take, before anything runs; starts no Ray and writes nothing.

Images, bytes, FLOPs and memory are counted from the recipe. Time follows from FLOPs and a device's speed, which is an
assumed share of its peak (hardware), measured by a warm-up on this machine (measure), or given by the user.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dit.config import DiTConfig, UViTConfig
from pipelines.config.recipe import Recipe
from pipelines.planning.hardware import Cluster, fit_workers
from pipelines.planning.networks import resolve_networks
from pipelines.planning.sizes import checkpoint_bytes
from pipelines.planning.stages import (
    StagePlan,
    plan_autoencoder_stage,
    plan_encode_stage,
    plan_evaluate_stage,
    plan_train_stage,
)
from pipelines.training.retention import outdated_steps
from raydit.errors import InvalidInput, NotFound

STAGES = ("autoencoder", "encode", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many images and classes a recipe has."""

    training: int
    held_out: int
    classes: int
    source: str
    """Where the numbers come from, in words."""


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
    """Bytes of the moments of all training images, with those of their horizontal flips if these are stored."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    checkpoints_written: int
    checkpoints_kept: int
    overrides: list[str] = field(default_factory=list)
    """Overrides of the recipe that the plan assumes, so that its workers use the cluster."""

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
    images_per_second: Mapping[str, float] | None = None,
) -> Plan:
    """Plan all stages of a recipe, with as many workers as the cluster has accelerators.

    keep: dotted fields that the user has set and that must not change. images_per_second: measured speeds of stages, by
    name, which replace computed ones. Raises NotFound for an unknown autoencoder, InvalidInput as fit_workers does.
    """
    networks, evaluate = resolve_networks(config, images.classes), config.evaluate
    # Features are needed of the held-out images and, unless reference statistics are given, of the training images.
    real_images = images.held_out + (0 if evaluate.reference else images.training)
    shards = {
        "encode": math.ceil(images.training / config.encode.shard_rows),
        "evaluate": math.ceil((evaluate.num_samples + real_images) / evaluate.shard_rows),
    }
    config, overrides = fit_workers(config, cluster, shards, keep)
    model, own = networks.model, config.autoencoder.train
    stages = [
        *([plan_autoencoder_stage(own, networks, cluster)] if own else []),
        plan_encode_stage(config.encode, networks, cluster, images=images.training),
        plan_train_stage(config.train, networks, cluster),
        plan_evaluate_stage(config.evaluate, networks, cluster, real_images=real_images),
    ]
    family = "U-ViT" if isinstance(model, UViTConfig) else "DiT"
    every, last = config.train.checkpoint_every, config.train.steps
    steps = sorted({*range(every, last + 1, every), last})
    return Plan(
        name=config.name,
        model=model,
        model_name=config.model.name or f"{family} of width {model.hidden_size} and depth {model.depth}",
        cluster=cluster,
        images=images,
        stages=[_at_speed(stage, (images_per_second or {}).get(stage.stage)) for stage in stages],
        latent_bytes=images.training * networks.moments_bytes(config.encode.flip),
        checkpoint_bytes=checkpoint_bytes(model, config.train),
        checkpoints_written=len(steps),
        checkpoints_kept=len(steps) - len(outdated_steps(steps, config.train, None)),
        overrides=overrides,
    )


def _at_speed(stage: StagePlan, images_per_second: float | None) -> StagePlan:
    """Return the plan of a stage at a speed that the user has measured, if there is one."""
    if images_per_second is None:
        return stage
    basis = f"given: {images_per_second:,g} images/s"
    return replace(stage, seconds=stage.images / images_per_second, limit="as given", basis=basis, step=None)


def count_images(config: Recipe, count: int | None, classes: int) -> Images:
    """Return how many images a recipe has: `count` if given, else those that its source lists.

    Raises NotFound if there is neither.
    """
    if count is not None:
        held_out = round(count * config.images.held_out)
        return Images(training=count - held_out, held_out=held_out, classes=classes, source="as given by --images")
    from pipelines.images.open import open_source

    try:
        training, others = open_source(config.images).listing().split(config.images.held_out)
    except FileNotFoundError as error:
        raise NotFound(str(error), "", "To plan without the images, give their number: --images 1281167") from None
    source = f"in {config.images.path}"
    return Images(training=len(training), held_out=len(others), classes=len(training.class_names), source=source)


def parse_speeds(measured: tuple[str, ...]) -> dict[str, float]:
    """Return images per second by stage from texts such as "train=812". Raises InvalidInput for another form."""
    speeds = {}
    for text in measured:
        stage, _, number = text.partition("=")
        try:
            speed = float(number)
        except ValueError:
            speed = 0.0
        if stage.strip() not in STAGES or not speed > 0:
            raise InvalidInput(
                f"--measured: found {text!r}",
                "STAGE=IMAGES_PER_SECOND, such as train=812",
                f"The stages are {', '.join(STAGES)}",
            )
        speeds[stage.strip()] = speed
    return speeds
