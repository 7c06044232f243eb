"""What a recipe's stages would need and take, before anything runs: `raydit plan`. Starts no Ray, writes nothing.

Everything is counted from the recipe: images, bytes, FLOPs, memory. Time follows from FLOPs and a device's speed:
assumed shares of its peak (hardware), a warm-up on this machine (measure), or speeds given.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit import autoencoder_size
from dit.config import DiTConfig, UViTConfig
from pipelines.config.recipe import Recipe
from pipelines.latents import schema
from pipelines.planning.hardware import Cluster, filled
from pipelines.planning.memory import Subject
from pipelines.planning.sizes import checkpoint_bytes, count_parameters
from pipelines.planning.stages import StagePlan, plan_autoencoder, plan_encode, plan_evaluate, plan_train
from pipelines.training.retention import outdated_steps

STAGES = ("autoencoder", "encode", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many there are to work on."""

    training: int
    held_out: int
    classes: int
    source: str
    """Where the numbers are from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs and takes from images to metrics, as if nothing of it were there yet."""

    name: str
    model: DiTConfig | UViTConfig
    cluster: Cluster
    images: Images
    stages: list[StagePlan]
    latent_bytes: int
    """Moments, of all images and their mirrors."""
    checkpoint_bytes: int
    checkpoints_written: int
    checkpoints_kept: int
    overrides: list[str] = field(default_factory=list)
    """What the plan counts on beside the recipe, whose own workers would not fill the cluster."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def dollars(self) -> float | None:
        """The whole cluster's, while the stages run one after the other."""
        price = self.cluster.dollars_per_hour
        return self.seconds / 3600 * self.cluster.count * price if price else None


def make_plan(
    config: Recipe,
    cluster: Cluster,
    images: Images,
    *,
    kept: frozenset[str] = frozenset(),
    given: Mapping[str, float] | None = None,
) -> Plan:
    """Plan all stages of a recipe, with as many workers as the cluster has accelerators.

    kept: dotted fields that the user has set, which stay. given: images per second of whole stages, by name, instead
    of computed ones. Raises FileNotFoundError for an unknown autoencoder, ValueError as `filled` does.
    """
    subject, overrides = planned_subject(config, cluster, images, kept)
    config = subject.config
    plans = [plan_autoencoder(subject)] if config.autoencoder.train else []
    plans += [plan_encode(subject), plan_train(subject), plan_evaluate(subject)]
    steps = checkpoint_steps(config)
    return Plan(
        name=config.name,
        model=subject.model,
        cluster=cluster,
        images=images,
        stages=[with_speed(plan, (given or {}).get(plan.stage)) for plan in plans],
        latent_bytes=images.training * image_bytes(config),
        checkpoint_bytes=checkpoint_bytes(count_parameters(subject.model), config.train),
        checkpoints_written=len(steps),
        checkpoints_kept=len(steps) - len(outdated_steps(steps, config.train, None)),
        overrides=overrides,
    )


def with_speed(plan: StagePlan, images_per_second: float | None) -> StagePlan:
    """The same at a speed that somebody has measured."""
    if images_per_second is None:
        return plan
    basis = f"given: {images_per_second:,g} images/s"
    return replace(plan, seconds=plan.images / images_per_second, limit="as given", basis=basis, step=None)


def planned_subject(
    config: Recipe, cluster: Cluster, images: Images, kept: frozenset[str]
) -> tuple[Subject, list[str]]:
    """What the stages' plans are made from, and the overrides that fit the recipe to the cluster."""
    autoencoder, side = autoencoder_config(config), config.images.size
    config, overrides = filled(config, cluster, kept, shard_counts(config, images))
    model = config.model.resolve(
        input_size=side // autoencoder_size.downsample(autoencoder),
        in_channels=autoencoder["latent_channels"],
        num_classes=images.classes,
        learn_sigma=config.objective.learn_sigma,
    )
    subject = Subject(
        config=config,
        cluster=cluster,
        images=images.training,
        scored=scored_images(config, images),
        model=replace(model, gradient_checkpointing=config.train.gradient_checkpointing),
        encoder=autoencoder_size.encoder_size(autoencoder, side),
        decoder=autoencoder_size.decoder_size(autoencoder, side),
    )
    return subject, overrides


def known_images(config: Recipe, count: int | None, classes: int) -> Images:
    """As many as are told, or as the source lists. Raises FileNotFoundError, telling what to do, if there is none."""
    if count is not None:
        aside = round(count * config.images.held_out)
        return Images(training=count - aside, held_out=aside, classes=classes, source="as told by --images")
    from pipelines.images.open import open_source

    try:
        training, held_out = open_source(config.images).listing().split(config.images.held_out)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. To plan without the images, say how many: --images 1281167") from None
    names = len(training.class_names)
    return Images(training=len(training), held_out=len(held_out), classes=names, source=f"in {config.images.path}")


def autoencoder_config(config: Recipe) -> dict[str, Any]:
    """The diffusers config of a recipe's autoencoder, without loading or fetching it. Raises FileNotFoundError."""
    train, id = config.autoencoder.train, config.autoencoder.id
    if train is not None:
        return autoencoder_size.own_config(
            latent_channels=train.latent_channels, downsample=train.downsample, width=train.width
        )
    assert id is not None, "a recipe has an id, or settings to train one"
    if (Path(id) / "config.json").is_file():
        return json.loads((Path(id) / "config.json").read_text())
    if id in autoencoder_size.STABLE_DIFFUSION:
        return autoencoder_size.STABLE_DIFFUSION_CONFIG
    if cached := _cached_config(id):
        return cached
    raise FileNotFoundError(
        f"autoencoder.id: found {id!r}, which is not on this machine, so that its size is not known; expected a "
        f"diffusers folder, a hub id that is cached, or one of {', '.join(autoencoder_size.STABLE_DIFFUSION)}. "
        "Download it first"
    )


def _cached_config(id: str) -> dict[str, Any] | None:
    """Of a hub id whose config.json was fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(id, "config.json")
    except HFValidationError:  # a path, and nothing there
        return None
    return json.loads(Path(file).read_text()) if isinstance(file, str) else None


def image_bytes(config: Recipe) -> int:
    """Moments of one image and, if wanted, of its mirror."""
    autoencoder = autoencoder_config(config)
    side = config.images.size // autoencoder_size.downsample(autoencoder)
    numbers = 2 * autoencoder["latent_channels"] * side**2 * (1 + config.encode.flip)
    return numbers * np.dtype(schema.MOMENTS_DTYPE).itemsize


def shard_counts(config: Recipe, images: Images) -> dict[str, int]:
    """Units of work of the stages that divide theirs: more workers than that have nothing to do."""
    evaluated = config.evaluate.num_samples + scored_images(config, images)
    return {
        "encode": math.ceil(images.training / config.encode.shard_rows),
        "evaluate": math.ceil(evaluated / config.evaluate.shard_rows),
    }


def scored_images(config: Recipe, images: Images) -> int:
    """Real images whose features an evaluation needs: the reference's, unless one is given, and the held-out ones'."""
    return images.held_out + (0 if config.evaluate.reference else images.training)


def checkpoint_steps(config: Recipe) -> list[int]:
    """Steps at which checkpoints are written."""
    every = config.train.checkpoint_every
    return sorted({*range(every, config.train.steps + 1, every), config.train.steps})
