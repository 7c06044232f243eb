"""The train job: latents -> checkpoints, by Ray Train."""

from dataclasses import asdict

from cluster import storage
from evaluation.protocol import parse_metric_name
from pipelines.artifacts import Artifact, settings_identity
from pipelines.autoencoder import autoencoder_of
from pipelines.config.model import ModelConfig
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.config.training import BESIDE_THE_WEIGHTS
from pipelines.figures import FIGURES
from pipelines.latents.dataset import LatentDataset
from pipelines.stage import StageContext, job
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.training.figures import TrainFigures
from pipelines.training.group import run_workers
from pipelines.training.messages import Report, Saved
from pipelines.training.previews import Previews
from pipelines.training.retention import Registered, best_step, outdated_steps

TOLD = "told.json"
"""Beside the checkpoints: the newest of them that tracking was told of."""


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
    Artifact("train", folder, identity).claim(
        [f"train.steps: {last} -> {config.train.steps}"] if last > config.train.steps else []
    )
    first = max(checkpoints.finished_steps(folder), default=0)
    if first == config.train.steps == told_step(folder):
        newest = checkpoints.newest(folder)
        assert newest is not None, "its step was listed"
        context.skipped("train", f"{first:,} steps, checkpoint {newest.location}")
        return newest

    with context.run("train", identity, {"raydit.latents_fingerprint": latents.fingerprint}) as run:
        run.params(resolved(config))
        run.input(name="latents", digest=latents.fingerprint, source=str(latents.path), context="training")
        if first:
            context.say("train", f"goes on from step {first:,}")
        watch = Watch(context, config, run, first)
        if first < config.train.steps:
            from pipelines.training.loop import train_worker

            run_workers(context, "train", config.train, train_worker, worker_settings(config, latents), watch.hear)
        newest = checkpoints.newest(folder)
        assert newest is not None, "training ends with a checkpoint"
        watch.end(newest.location)
    return newest


class Watch:
    """What the driver does while workers train: progress, metrics, models, pictures, and which checkpoints stay."""

    def __init__(self, context: StageContext, config: Recipe, run, first: int):
        from pipelines.checkpoints import stored as checkpoints

        self._config, self._run = config, run
        self._folder = config.folder("checkpoints")
        self._progress = context.progress("train", total=config.train.steps, unit="steps", start=first)
        self._previews = Previews(context, config, run)
        self._registered = Registered(config.tracking.uri, lambda text: context.say("train", text))
        self._figures = TrainFigures(run, config.folder(FIGURES), config.train.global_batch_size)
        self._last: dict[str, float] = {}
        self._told = told_step(self._folder)
        # What a killed driver did not hear any more.
        for step in checkpoints.finished_steps(self._folder):
            if step > self._told:
                for report in checkpoints.described(self._folder, step).trainer_state.get("reports", []):
                    self._tell(Report(**report))
                self._log(step)

    def hear(self, message: Report | Saved) -> None:
        """Take note of what the workers tell."""
        from pipelines.checkpoints import stored as checkpoints

        if isinstance(message, Saved):
            self._log(message.step)
            self._figures.save()
            self._previews.start(checkpoints.checkpoint_location(self._folder, message.step), message.step)
            self._retain()
        else:
            self._tell(message)
            self._progress.to(message.step, loss=self._last["loss"], lr=self._last["lr"])
        self._previews.collect()

    def end(self, newest: str) -> None:
        """Finish what was begun, and say how it went and where the last checkpoint is."""
        self._figures.save()
        self._previews.collect(wait=True)
        self._retain(at_the_end=True)
        said = [f"{self._config.train.steps:,} steps"]
        if last := self._last:
            said += [f"{last['images_per_second']:.0f} images/s", f"MFU {last['mfu']:.0%}"]
            said += [f"data wait {last['data_wait']:.1%}"]
        self._progress.done(", ".join([*said, f"checkpoint {newest}"]))

    def _tell(self, report: Report) -> None:
        from pipelines.training.metrics import with_quartiles

        self._last = with_quartiles(report.metrics)
        self._figures.add(report.step, self._last)
        self._run.metrics({f"train/{name}": value for name, value in self._last.items()}, report.step)

    def _log(self, step: int) -> None:
        """Tell tracking of a checkpoint; of the reports before it it was told already."""
        from pipelines.checkpoints import stored as checkpoints

        checkpoint = checkpoints.described(self._folder, step)
        log_checkpoint(self._run, checkpoint, checkpoint.location)
        storage.write_json_atomically(storage.join(self._folder, TOLD), {"step": step})
        self._told = step

    def _retain(self, *, at_the_end: bool = False) -> None:
        from pipelines.checkpoints import stored as checkpoints

        train = self._config.train
        if train.keep_last is None:
            return
        best = best_step(self._config.folder("evaluations"), train.keep_best) if train.keep_best else None
        # The workers are ahead of what was told; and what a picture is drawn of must stay until it is there.
        steps = [step for step in checkpoints.finished_steps(self._folder) if step <= self._told]
        outdated = [step for step in outdated_steps(steps, train, best) if step not in self._previews.pending_steps]
        digests = {step: checkpoints.described(self._folder, step).digest for step in outdated}
        for step, digest in self._registered.without(digests, again=at_the_end).items():
            checkpoints.remove(self._folder, step)
            self._run.model_removed(digest)


def told_step(folder: str) -> int:
    """Step of the newest checkpoint that tracking was told of, and with it of everything before."""
    place = storage.join(folder, TOLD)
    return storage.read_json(place)["step"] if storage.exists(place) else 0


def worker_settings(config: Recipe, latents: LatentDataset) -> dict:
    """What every worker is told: the recipe, and what follows from it and the latents."""
    from dit.checkpoint import describe_checkpoint

    model = model_config(config.model, config, latents)
    objective = {"kind": config.objective.kind, **config.objective.settings()}
    return {
        "config": config,
        "model": asdict(model),
        "objective": objective,
        "latents": str(latents.path),
        "folder": config.folder("checkpoints"),
        "checkpoint": describe_checkpoint(
            model=model,
            objective=objective,
            # As this recipe names it: latents that recipes share were made in another output.
            autoencoder=latents.manifest["autoencoder"] | {"id": autoencoder_of(config).id},
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
    # The default is in no identity, so that checkpoints of before the choice existed stay what they are.
    default = ("dtype",) if config.train.dtype == "float32" else ()
    return {
        "seed": config.seed,
        "latents": {"fingerprint": latents.fingerprint},
        "model": asdict(config.model),
        "objective": asdict(config.objective),
        "train": settings_identity(config.train, ("steps", *BESIDE_THE_WEIGHTS, *default)),
    }
