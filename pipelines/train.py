"""The train job: latents -> checkpoints, by Ray Train."""

from dataclasses import asdict

from pipelines.autoencoder import autoencoder_of
from pipelines.config import Recipe
from pipelines.config_model import ModelConfig
from pipelines.config_train import BESIDE_THE_WEIGHTS
from pipelines.identity import Artifact, settings_identity
from pipelines.latents import LatentDataset
from pipelines.logged_models import log_checkpoint
from pipelines.messages import Report, Saved
from pipelines.previews import Previews
from pipelines.recipe_file import resolved
from pipelines.retention import best_step, outdated_steps, remove_checkpoint
from pipelines.stage import StageContext, job
from pipelines.workers import run_workers


@job
def train(config: Recipe, *, context: StageContext):
    """Train the recipe's model on its latents, or go on where an earlier run stopped.

    Returns the last `dit.checkpoint.Checkpoint`. Raises FileNotFoundError or ValueError before any work if the
    latents are not there or do not fit.
    """
    from dit.checkpoint import newest_checkpoint

    if config.train.keep_best:
        best_step(config.folder("evaluations"), config.train.keep_best)  # its name is checked before any work
    folder = config.folder("checkpoints")
    latents = LatentDataset.open(config.latents)
    check_latents(config, latents)
    identity = train_identity(config, latents)
    newest = newest_checkpoint(folder)
    too_far = newest is not None and newest.step > config.train.steps
    Artifact("train", folder, identity).claim(
        [f"train.steps: {newest.step} -> {config.train.steps}"] if newest and too_far else []
    )
    newest = newest_checkpoint(folder)
    if newest is not None and newest.step == config.train.steps:
        context.skipped("train", f"{newest.step:,} steps, checkpoint {newest.path}")
        return newest

    with context.run("train", identity, {"raydit.latents_fingerprint": latents.fingerprint}) as run:
        run.params(resolved(config))
        run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
        first = newest.step if newest else 0
        if first:
            context.say("train", f"goes on from step {first:,}")
        watch = Watch(context, config, run, first)
        # Imported by the workers: the driver needs no torch before.
        from pipelines.train_worker import train_worker

        run_workers(context, "train", config.train, train_worker, worker_settings(config, latents), watch.hear)
        newest = newest_checkpoint(folder)
        assert newest is not None, "training ends with a checkpoint"
        watch.end(newest)
    return newest


class Watch:
    """What the driver does while workers train: progress, metrics, models, pictures, and which checkpoints stay."""

    def __init__(self, context: StageContext, config: Recipe, run, first: int):
        from dit.checkpoint import finished_steps

        self._config, self._run = config, run
        self._folder = config.folder("checkpoints")
        self._progress = context.progress("train", total=config.train.steps, unit="steps", start=first)
        self._previews = Previews(context, config, run)
        self._last: dict[str, float] = {}
        # Checkpoints that a killed driver heard nothing of any more.
        for step in finished_steps(self._folder):
            self._log(step)

    def hear(self, message: Report | Saved) -> None:
        """Take note of what the workers tell."""
        from dit.checkpoint import step_name
        from pipelines.train_metrics import with_quartiles

        if isinstance(message, Saved):
            self._log(message.step)
            self._previews.start(self._folder / step_name(message.step), message.step)
            self._retain()
        else:
            self._last = with_quartiles(message.metrics)
            self._progress.to(message.step, loss=self._last["loss"], lr=self._last["lr"])
            self._run.metrics({f"train/{name}": value for name, value in self._last.items()}, message.step)
        self._previews.collect()

    def end(self, newest) -> None:
        """Finish what was begun, and say how it went."""
        self._previews.collect(wait=True)
        last = self._last
        speed = f"{last['images_per_second']:.0f} images/s, MFU {last['mfu']:.0%}, data wait {last['data_wait']:.1%}"
        self._progress.done(f"{newest.step:,} steps, {speed}, checkpoint {newest.path}")

    def _log(self, step: int) -> None:
        from dit.checkpoint import load_checkpoint, step_name

        log_checkpoint(self._run, load_checkpoint(self._folder / step_name(step)))

    def _retain(self) -> None:
        from dit.checkpoint import finished_steps, load_checkpoint, step_name

        train = self._config.train
        best = best_step(self._config.folder("evaluations"), train.keep_best) if train.keep_best else None
        for step in outdated_steps(finished_steps(self._folder), train, best):
            checkpoint = load_checkpoint(self._folder / step_name(step))
            remove_checkpoint(checkpoint.path)
            self._run.model_removed(checkpoint.digest)


def worker_settings(config: Recipe, latents: LatentDataset) -> dict:
    from dit.checkpoint import describe_checkpoint

    model = model_config(config.model, config, latents)
    objective = {"kind": config.objective.kind, **config.objective.settings()}
    return {
        "config": config,
        "model": asdict(model),
        "objective": objective,
        "latents": str(latents.path),
        "folder": str(config.folder("checkpoints")),
        "checkpoint": describe_checkpoint(
            model=model,
            objective=objective,
            autoencoder=latents.manifest["autoencoder"],
            preprocessing=latents.manifest["preprocessing"],
            class_names=latents.class_names,
            seed=config.seed,
            latents_fingerprint=latents.fingerprint,
            recipe=resolved(config),
        ),
    }


def model_config(model: ModelConfig, config: Recipe, latents: LatentDataset):
    """The model's configuration, with what follows from the latents. Raises ValueError if they do not fit."""
    channels, height, width = latents.latent_shape
    return model.resolve(
        input_size=height if height == width else (height, width),
        in_channels=channels,
        num_classes=len(latents.class_names),
        learn_sigma=config.objective.learn_sigma,
    )


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
    return {
        "seed": config.seed,
        "latents": {"fingerprint": latents.fingerprint},
        "model": asdict(config.model),
        "objective": asdict(config.objective),
        "train": settings_identity(config.train, ("steps", *BESIDE_THE_WEIGHTS)),
    }
