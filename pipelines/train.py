"""The train job: latents -> checkpoints, by Ray Train."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.artifacts import Artifact, settings_identity
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.model import MODEL_DEFAULTS, OBJECTIVE_DEFAULTS
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe, random_setting
from pipelines.config.training import LENGTH_FIELDS, NON_IDENTITY_FIELDS
from pipelines.console import say
from pipelines.images.listing import summarize_images
from pipelines.latents.class_order import with_recorded_class_order
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.held_out import held_out_latents
from pipelines.latents.recipe_match import require_latents_of, require_training_images
from pipelines.latents.recorded_images import require_classes
from pipelines.latents.source_images import check_source_images, find_locations
from pipelines.latents.verify import check_digests
from pipelines.scoring.samples.guide import own_guide_step
from pipelines.scoring.settings import EVALUATIONS
from pipelines.stage import JobContext, job
from pipelines.tracking import tags
from pipelines.tracking.run_log import FIGURES, RunLog, log_sections
from pipelines.training.group.run_workers import RAY_FOLDER, run_workers
from pipelines.training.loop import train_worker
from pipelines.training.monitoring.figures import TrainFigures
from pipelines.training.monitoring.monitor import TrainingMonitor, is_completed, last_logged_step, logged_run
from pipelines.training.monitoring.previews import Previews
from pipelines.training.monitoring.retention import ProtectedCheckpoints, Retention, check_keep_best, explain_retention
from pipelines.training.settings import train_worker_settings
from pipelines.training.starting.adapter import require_base
from pipelines.training.starting.damage import set_aside_damaged
from pipelines.training.starting.extension import explain_schedule_change, has_same_rates
from pipelines.training.starting.new_data import ACCEPTED, accepted_start, keep_accepted, take_new_data
from pipelines.training.starting.start import (
    TrainingStart,
    changed_by_start,
    check_trained_parameters,
    describe_start,
    explain_scale,
    find_start,
    starting_from,
    target_model,
    with_recorded_start,
    write_first_checkpoint,
)
from raydit.errors import RayditError

NUM_VERIFIED_SHARDS = 4
"""Shards of the latents whose digests are checked before each training: some 50 MB."""
NUM_VERIFIED_IMAGES = 4
"""Images that are read before each training, if it encodes them."""


@job
def train(
    config: Recipe, *, verify: bool = False, accept_new_data: bool = False, context: JobContext
) -> LocatedCheckpoint:
    """Train the recipe's model on its latents, or resume where an earlier run stopped, and return the last checkpoint.

    verify: compare all latents with their digests first, and not only NUM_VERIFIED_SHARDS shards; where training
    encodes images, compare all of them, and not only NUM_VERIFIED_IMAGES. accept_new_data: if the latents differ from
    those the checkpoints were trained on, start from the newest checkpoint instead of from the recipe's start. Raises
    NotFound or InvalidInput before any work if the latents do not exist, do not fit or are damaged.
    """
    settings = config.train
    if settings.keep_best:
        check_keep_best(settings.keep_best)
    checkpoints = CheckpointFolder(config.folder("checkpoints"))
    latents = LatentDataset.open(config.latents)
    config = with_recorded_class_order(config, latents.recipe)
    classes = latents.class_names
    require_classes(config, classes, (), checkpoints.uri)
    held_out = held_out_latents(config) if settings.validate_every else None
    for dataset in filter(None, (latents, held_out)):
        require_latents_of(config, dataset)
    require_training_images(config.images, latents)
    artifact = training_artifact(config, latents)
    if accept_new_data:
        artifact = take_new_data(artifact, lambda text: context.say("train", text))
    identity = artifact.identity
    worker_settings = train_worker_settings(config, latents, held_out)
    if (start := accepted_start(identity, checkpoints) or find_start(config)) is not None:
        worker_settings = starting_from(worker_settings, start, latents)
    changed = changed_by_start(start, settings, target_model(worker_settings))
    trained = check_trained_parameters(settings, worker_settings.model, changed)

    def before_move() -> None:
        if start is not None:
            start.require_usable(settings)
        context.prepare_work(settings, "train")

    def same_rates(step: int) -> bool:
        recorded = (checkpoints.describe(step).record.recipe or {}).get("train")
        return recorded is not None and has_same_rates(settings, recorded, step)

    prepare_checkpoints(artifact, settings.steps, before_move, same_rates)
    if not (is_trained := last_regular_step(checkpoints.uri) == settings.steps):
        set_aside_damaged(checkpoints, lambda text: context.say("train", text))
    worker_settings = with_recorded_start(worker_settings, checkpoints)
    first, begun = checkpoints.last_step(), checkpoints.has_any()
    change = describe_schedule_change(config, checkpoints, first)
    if first == settings.steps == last_logged_step(checkpoints) and is_completed(checkpoints):
        newest = checkpoints.open(first)
        context.skipped("train", f"{first:,} steps, checkpoint {newest.origin}")
        return newest

    if begun and settings.lora is not None:
        require_base(checkpoints.open(first))
    check_digests(latents, None if verify else NUM_VERIFIED_SHARDS)
    if worker_settings.encoding is not None:
        encoding = worker_settings.encoding
        encoding = replace(encoding, locations=find_locations(latents, encoding.images))
        count = len(latents) if verify else NUM_VERIFIED_IMAGES
        check_source_images(latents, encoding.images, encoding.locations, count)
        worker_settings = replace(worker_settings, encoding=encoding)
    context.say("train", summarize_images(len(latents), len(classes)))
    if not is_trained:
        context.prepare_work(settings, "train")
        for line in explain_retention(settings, config.evaluate):
            context.say("train", line)
    run_tags = {tags.LATENTS_FINGERPRINT: latents.fingerprint}
    with context.run("train", identity, run_tags, resumes=logged_run(checkpoints) if begun else "") as run:
        log_train_settings(run, config, latents, identity.get(ACCEPTED) or identity.get("start"))
        run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
        if held_out is not None:
            source = str(held_out.path)
            run.input(name="held-out latents", digest=held_out.fingerprint, source=source, context="validation")
        if start is not None:
            if not begun:
                start = accepted_start(identity, checkpoints) or start  # it was moved to superseded/ just now
                worker_settings, started = write_first_checkpoint(start, worker_settings)
                for line in describe_start(start, started, lora=settings.lora is not None):
                    context.say("train", line)
            if scaling := explain_scale(worker_settings.scale, latents):
                context.say("train", scaling)
            log_start(run, worker_settings.record["start"], worker_settings.record.get("base"))
        if trained:
            context.say("train", trained)
        if first == settings.steps and not is_trained:
            context.say("train", f"training was stopped after step {first:,}, which is now its last step")
        elif first:
            context.say("train", f"resumes from step {first:,}")
        if change:
            context.say("train", change)
        monitor = start_monitor(config, context, run, checkpoints, first)
        if not is_trained:
            run_workers(
                context,
                "train",
                settings,
                train_worker,
                worker_settings,
                monitor.on_message,
                ray_folder=config.folder(RAY_FOLDER),
            )
        else:
            draw_missed_samples(monitor, config, context)
        newest = checkpoints.open(checkpoints.last_step())
        monitor.finish(newest.origin)
    return newest


def train_identity(config: Recipe, latents: LatentDataset, start: TrainingStart | None = None) -> dict[str, Any]:
    """Return what the weights depend on: neither the number of workers, nor the length, since training can continue.

    start: the weights that it starts from, by their digest.
    """
    # The default dtype is left out, so that checkpoints that are older than the field keep their identity.
    default = ("dtype",) if config.train.dtype == "float32" else ()
    recorded = resolved(config)
    return {
        "seed": config.seed,
        **random_setting(config),
        "latents": {"fingerprint": latents.fingerprint},
        "model": recorded["model"],
        "objective": recorded["objective"],
        "train": settings_identity(config.train, (*LENGTH_FIELDS, *NON_IDENTITY_FIELDS, *default, "start")),
        **({} if start is None else {"start": start.identity(latents, config.objective.kind)}),
    }


def training_artifact(config: Recipe, latents: LatentDataset) -> Artifact:
    """Return the checkpoints of the recipe's training, with the new data that the one in the folder has accepted."""
    identity = train_identity(config, latents, find_start(config))
    defaults = {"model": MODEL_DEFAULTS, "objective": OBJECTIVE_DEFAULTS, "train": config.train.defaults}
    return keep_accepted(Artifact("train", config.folder("checkpoints"), identity, defaults))


def log_train_settings(
    run: RunLog, config: Recipe, latents: LatentDataset, start: dict[str, Any] | None = None
) -> None:
    """Log what identifies a training, and what may be another when it resumes. The whole recipe is an artifact.

    start: what identifies the weights that it starts from, wherever these lie.
    """
    recorded = resolved(config)
    sections = {name: recorded.get(name) for name in ("seed", "random", "model", "objective", "train")}
    if patterns := recorded["train"].get("lr_multipliers"):
        # One param, because MLflow takes no names with the characters of patterns.
        sections["train"] = recorded["train"] | {"lr_multipliers": json.dumps(patterns)}
    log_sections(
        run,
        {**sections, "start": start, "images": latents.preprocessing},
        may_change={"train": ("steps", "start", *NON_IDENTITY_FIELDS)},
    )


def log_start(run: RunLog, start: dict[str, Any], base: dict[str, Any] | None = None) -> None:
    """Log the weights that a training started from. start: what its checkpoints record about them.

    base: what they record about the base of their adapter, which no training may remove from then on.
    """
    if base is not None:
        run.tag(tags.BASE_DIGEST, base["digest"])
    run.tag(tags.START, start["checkpoint"])
    run.tag(tags.START_SHA256, start["sha256"])
    run.input(name="start", digest=start["sha256"], source=start["checkpoint"], context="start")


def find_trained(config: Recipe, latents: LatentDataset) -> LocatedCheckpoint | None:
    """Return the last checkpoint of the recipe's finished training, which may have been superseded; None if unfinished.

    latents: those of the recipe, wherever they lie.
    """
    steps = config.train.steps
    found = training_artifact(config, latents).find(lambda folder: last_regular_step(folder) == steps)
    return None if found is None else CheckpointFolder(found).open(steps)


def prepare_checkpoints(
    artifact: Artifact,
    steps: int,
    before_move: Callable[[], object] = lambda: None,
    same_rates: Callable[[int], bool] = lambda step: False,
) -> None:
    """Reserve the folder for this training; checkpoints of another one, or beyond `steps`, are moved away first.

    Superseded checkpoints of this training are taken back, those that reach `steps` before any others. If regular
    checkpoints lie beyond `steps`, training begins anew, unless one up to `steps` is on the way of the shorter training
    too: same_rates(step) says whether its learning rates are those of the recipe. Then those beyond are moved away
    alone, as interrupted ones always are. An interrupted one at `steps` stays: the workers make a regular one of it.
    before_move: as in `Artifact.prepare`.
    """
    checkpoints = CheckpointFolder(artifact.folder)
    finished = checkpoints.finished_steps()
    last, on_the_way = (max((step for step in finished if step <= most), default=0) for most in (math.inf, steps))

    def reaches(folder: str) -> bool:
        return last_regular_step(folder) == steps

    def leads_to(folder: str) -> bool:
        return last_regular_step(folder) <= steps

    is_further = 0 < last < steps and artifact.find_superseded(reaches) is not None
    goes_back = last > steps and on_the_way > 0 and not artifact.changes() and same_rates(on_the_way)
    reasons = [f"train.steps: {last} -> {steps}"] if (last > steps and not goes_back) or is_further else []
    artifact.prepare(reasons, fits=leads_to, is_finished=reaches, before_move=before_move)
    for step in checkpoints.all_steps():
        if step > steps:
            kept = checkpoints.set_aside(step)
            say("train", f"the checkpoint of step {step:,}, beyond train.steps = {steps:,}, is kept in {kept}")


def last_regular_step(folder: str) -> int:
    """Return the step of the last checkpoint in a folder at which no training was stopped; 0 if there is none."""
    return max(CheckpointFolder(folder).finished_steps(), default=0)


def describe_schedule_change(config: Recipe, checkpoints: CheckpointFolder, first: int) -> str:
    """Return in words how the learning rate changes at step `first`, from which training resumes; empty if not.

    Raises InvalidInput if the recipe's learning rate is not that of the steps that are done.
    """
    recorded = (checkpoints.describe(first).record.recipe or {}).get("train") if first else None
    return explain_schedule_change(config.train, recorded, first) if recorded else ""


def start_monitor(
    config: Recipe, context: JobContext, run: RunLog, checkpoints: CheckpointFolder, first_step: int
) -> TrainingMonitor:
    """Assemble what follows the training in this process. first_step: where the training resumes."""

    def say(text: str) -> None:
        context.say("train", text)

    protected = ProtectedCheckpoints(config.tracking.uri, say)
    guide_step = own_guide_step(config.evaluate, config.folder("checkpoints"))
    return TrainingMonitor(
        config.train,
        checkpoints,
        run,
        say=say,
        progress=context.progress("train", total=config.train.steps, unit="steps", start=first_step),
        figures=TrainFigures(run, config.folder(FIGURES), config.train.global_batch_size),
        previews=Previews(config, run, say),
        retention=Retention(config.train, checkpoints, config.folder(EVALUATIONS), protected, guide_step=guide_step),
    )


def draw_missed_samples(monitor: TrainingMonitor, config: Recipe, context: JobContext) -> None:
    """Start the grids of samples that an interrupted driver has not drawn, or say why they cannot be drawn."""
    if not monitor.missed_samples:
        return
    try:
        context.start_ray(config.evaluate, "evaluate")
        monitor.draw_missed_samples()
    except RayditError as error:
        steps = ", ".join(f"{step:,}" for step in sorted(monitor.missed_samples))
        context.say("train", f"no samples of step {steps}: {error}")
