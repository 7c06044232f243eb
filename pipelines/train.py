"""The train job: latents -> checkpoints, by Ray Train."""

from typing import Any

from evaluation.metric_names import parse_metric_name
from pipelines.artifacts import Artifact, settings_identity
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.config.training import NON_IDENTITY_FIELDS
from pipelines.images.listing import summarize_images
from pipelines.latents.autoencoder import AutoencoderHandle, autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.recorded_images import require_classes
from pipelines.scoring.settings import EVALUATIONS
from pipelines.stage import JobContext, job
from pipelines.tracking import tags
from pipelines.tracking.run_log import FIGURES, RunLog
from pipelines.training.figures import TrainFigures
from pipelines.training.group import RAY_FOLDER, run_workers
from pipelines.training.loop import train_worker
from pipelines.training.monitor import TrainingMonitor, last_logged_step
from pipelines.training.previews import Previews
from pipelines.training.retention import ProtectedCheckpoints, Retention
from pipelines.training.settings import train_worker_settings
from raydit.errors import InvalidInput


@job
def train(config: Recipe, *, context: JobContext) -> LocatedCheckpoint:
    """Train the recipe's model on its latents, or resume where an earlier run stopped, and return the last checkpoint.

    Raises NotFound or InvalidInput before any work if the latents do not exist or do not fit.
    """
    settings = config.train
    if settings.keep_best:
        parse_metric_name(settings.keep_best)  # refuses an unknown metric before any work
    checkpoints = CheckpointFolder(config.folder("checkpoints"))
    latents = LatentDataset.open(config.latents)
    classes = latents.class_names
    require_classes(config, classes, (), checkpoints.uri)
    check_latents(latents, autoencoder_of(config))
    identity = train_identity(config, latents)
    prepare_checkpoints(checkpoints, identity, settings.steps)
    first = checkpoints.last_step()
    if first == settings.steps == last_logged_step(checkpoints):
        newest = checkpoints.open(first)
        context.skipped("train", f"{first:,} steps, checkpoint {newest.origin}")
        return newest

    context.say("train", summarize_images(len(latents), len(classes)))
    with context.run("train", identity, {tags.LATENTS_FINGERPRINT: latents.fingerprint}) as run:
        run.params(resolved(config))
        run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
        if first:
            context.say("train", f"resumes from step {first:,}")
        monitor = start_monitor(config, context, run, checkpoints, first)
        if first < settings.steps:
            worker_settings = train_worker_settings(config, latents)
            run_workers(
                context,
                "train",
                settings,
                train_worker,
                worker_settings,
                monitor.on_message,
                ray_folder=config.folder(RAY_FOLDER),
            )
        newest = checkpoints.open(checkpoints.last_step())
        monitor.finish(newest.origin)
    return newest


def check_latents(latents: LatentDataset, autoencoder: AutoencoderHandle) -> None:
    """Raise InvalidInput if another autoencoder made the latents, or if there are none."""
    expected = autoencoder.describe()["sha256"]
    found = latents.autoencoder
    if found["sha256"] != expected:
        raise InvalidInput(
            f"latents at {latents.path} were made by the autoencoder {found['id']!r} ({found['sha256'][:12]})",
            f"the recipe's, {autoencoder.id!r} ({expected[:12]})",
            "run `raydit encode` again, or set autoencoder.id to the one that made them",
        )
    if len(latents) == 0:
        raise InvalidInput(
            f"latents at {latents.path}: found 0 usable images",
            "at least one",
            "see quarantine.parquet there for the reasons",
        )


def train_identity(config: Recipe, latents: LatentDataset) -> dict[str, Any]:
    """Return what the weights depend on: neither the number of workers, nor `steps`, since training can continue."""
    # The default dtype is left out, so that checkpoints that are older than the field keep their identity.
    default = ("dtype",) if config.train.dtype == "float32" else ()
    recorded = resolved(config)
    return {
        "seed": config.seed,
        "latents": {"fingerprint": latents.fingerprint},
        "model": recorded["model"],
        "objective": recorded["objective"],
        "train": settings_identity(config.train, ("steps", *NON_IDENTITY_FIELDS, *default)),
    }


def prepare_checkpoints(checkpoints: CheckpointFolder, identity: dict[str, Any], steps: int) -> None:
    """Reserve the folder for this training; checkpoints of another one, or beyond `steps`, are moved away first."""
    last = checkpoints.last_step()
    reasons = [f"train.steps: {last} -> {steps}"] if last > steps else []
    Artifact("train", checkpoints.uri, identity).prepare(reasons)


def start_monitor(
    config: Recipe, context: JobContext, run: RunLog, checkpoints: CheckpointFolder, first_step: int
) -> TrainingMonitor:
    """Assemble what follows the training in this process. first_step: where the training resumes."""

    def say(text: str) -> None:
        context.say("train", text)

    protected = ProtectedCheckpoints(config.tracking.uri, say)
    return TrainingMonitor(
        config.train,
        checkpoints,
        run,
        progress=context.progress("train", total=config.train.steps, unit="steps", start=first_step),
        figures=TrainFigures(run, config.folder(FIGURES), config.train.global_batch_size),
        previews=Previews(config, run, say),
        retention=Retention(config.train, checkpoints, config.folder(EVALUATIONS), protected),
    )
