"""The train job: latents -> checkpoints, by Ray Train."""

from dataclasses import asdict

from evaluation.protocol import parse_metric_name
from pipelines.artifacts import Artifact, settings_identity
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.config.training import NON_IDENTITY_FIELDS
from pipelines.latents.autoencoder import autoencoder_of
from pipelines.latents.dataset import LatentDataset
from pipelines.stage import StageContext, job
from pipelines.training.group import run_workers
from pipelines.training.monitor import TrainingMonitor, last_logged_step
from pipelines.training.settings import worker_settings


@job
def train(config: Recipe, *, context: StageContext):
    """Train the recipe's model on its latents, or go on where an earlier run stopped.

    Returns the last `dit.checkpoint.Checkpoint`. Raises FileNotFoundError or ValueError before any work if the
    latents are not there or do not fit.
    """
    from pipelines.checkpoints import stored as checkpoints

    if config.train.keep_best:
        parse_metric_name(config.train.keep_best)  # refused before any work
    folder = config.folder("checkpoints")
    latents = LatentDataset.open(config.latents)
    check_latents(config, latents)
    identity = train_identity(config, latents)
    last = max(checkpoints.finished_steps(folder), default=0)
    Artifact("train", folder, identity).prepare(
        [f"train.steps: {last} -> {config.train.steps}"] if last > config.train.steps else []
    )
    first = max(checkpoints.finished_steps(folder), default=0)
    if first == config.train.steps == last_logged_step(folder):
        newest = checkpoints.newest(folder)
        assert newest is not None, "its step was listed"
        context.skipped("train", f"{first:,} steps, checkpoint {newest.location}")
        return newest

    with context.run("train", identity, {"raydit.latents_fingerprint": latents.fingerprint}) as run:
        run.params(resolved(config))
        run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
        if first:
            context.say("train", f"goes on from step {first:,}")
        watch = TrainingMonitor(context, config, run, first)
        if first < config.train.steps:
            from pipelines.training.loop import train_worker

            run_workers(
                context, "train", config.train, train_worker, worker_settings(config, latents), watch.on_message
            )
        newest = checkpoints.newest(folder)
        assert newest is not None, "training ends with a checkpoint"
        watch.end(newest.location)
    return newest


def check_latents(config: Recipe, latents: LatentDataset) -> None:
    """Refuse latents that the recipe's autoencoder did not make, and a data set without images."""
    expected = autoencoder_of(config).describe()["sha256"]
    found = latents.manifest["autoencoder"]
    if found["sha256"] != expected:
        raise ValueError(
            f"latents at {latents.path} were made by the autoencoder {found['id']!r} ({found['sha256'][:12]}), but the "
            f"recipe's is {autoencoder_of(config).id!r} ({expected[:12]}). Run `raydit encode` again, or set "
            "autoencoder.id to the one that made them"
        )
    if len(latents) == 0:
        raise ValueError(
            f"latents at {latents.path}: found 0 usable images, expected some; see quarantine.parquet there"
        )


def train_identity(config: Recipe, latents: LatentDataset) -> dict:
    """What the weights depend on. Not the number of workers, and not `steps`: more steps go on from the last."""
    # The default is in no identity, so that checkpoints of before the choice existed stay what they are.
    default = ("dtype",) if config.train.dtype == "float32" else ()
    return {
        "seed": config.seed,
        "latents": {"fingerprint": latents.fingerprint},
        "model": asdict(config.model),
        "objective": asdict(config.objective),
        "train": settings_identity(config.train, ("steps", *NON_IDENTITY_FIELDS, *default)),
    }
