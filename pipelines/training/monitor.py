"""What the driver does while workers train: progress, metrics, models, previews and retention."""

from cluster import storage
from pipelines.config.recipe import Recipe
from pipelines.figures import FIGURES
from pipelines.stage import StageContext
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.training.figures import TrainFigures
from pipelines.training.messages import Report, Saved
from pipelines.training.previews import Previews
from pipelines.training.retention import ProtectedCheckpoints, best_step, outdated_steps

TRACKING_CURSOR = "told.json"
"""Beside the checkpoints: the newest of them that tracking was told of."""


class TrainingMonitor:
    """What the driver does while workers train: progress, metrics, models, pictures, and which checkpoints stay."""

    def __init__(self, context: StageContext, config: Recipe, run, first: int):
        from pipelines.checkpoints import stored as checkpoints

        self._config, self._run = config, run
        self._folder = config.folder("checkpoints")
        self._progress = context.progress("train", total=config.train.steps, unit="steps", start=first)
        self._previews = Previews(context, config, run)
        self._registered = ProtectedCheckpoints(config.tracking.uri, lambda text: context.say("train", text))
        self._figures = TrainFigures(run, config.folder(FIGURES), config.train.global_batch_size)
        self._last: dict[str, float] = {}
        self._told = last_logged_step(self._folder)
        # What a killed driver did not hear any more.
        for step in checkpoints.finished_steps(self._folder):
            if step > self._told:
                for report in checkpoints.describe_step(self._folder, step).trainer_state.get("reports", []):
                    self._tell(Report(**report))
                self._log(step)

    def on_message(self, message: Report | Saved) -> None:
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
        from pipelines.training.metrics import add_quartile_losses

        self._last = add_quartile_losses(report.metrics)
        self._figures.add(report.step, self._last)
        self._run.metrics({f"train/{name}": value for name, value in self._last.items()}, report.step)

    def _log(self, step: int) -> None:
        """Tell tracking of a checkpoint; of the reports before it it was told already."""
        from pipelines.checkpoints import stored as checkpoints

        checkpoint = checkpoints.describe_step(self._folder, step)
        log_checkpoint(self._run, checkpoint, checkpoint.location)
        storage.write_json_atomically(storage.join(self._folder, TRACKING_CURSOR), {"step": step})
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
        digests = {step: checkpoints.describe_step(self._folder, step).digest for step in outdated}
        for step, digest in self._registered.filter_removable(digests, force_refresh=at_the_end).items():
            checkpoints.remove(self._folder, step)
            self._run.model_removed(digest)


def last_logged_step(folder: str) -> int:
    """Step of the newest checkpoint that tracking was told of, and with it of everything before."""
    place = storage.join(folder, TRACKING_CURSOR)
    return storage.read_json(place)["step"] if storage.exists(place) else 0
