"""What the driver does while workers train: progress, metrics, models, previews and retention."""

import math
from collections.abc import Callable
from typing import Any

from cluster import storage
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.training import VALIDATION, TrainConfig
from pipelines.console import Progress
from pipelines.tracking.logged_models import log_checkpoint
from pipelines.tracking.run_log import RunLog
from pipelines.training.cursor import DataCursor
from pipelines.training.group.messages import Report, Saved, Validated
from pipelines.training.metrics import add_quartile_losses
from pipelines.training.monitoring.figures import TrainFigures
from pipelines.training.monitoring.previews import Previews
from pipelines.training.monitoring.retention import Retention

TRACKING_CURSOR = "told.json"
"""File in the folder of checkpoints: the step of the newest one that was logged to tracking, and the run's key.

Until the driver has come to its end, also "finished": false, and the steps whose grids of samples are not drawn.
"""
REPLAY_TOLERANCE = 1e-4
"""Relative difference of the losses of a step that is computed a second time, from the same images."""


class TrainingMonitor:
    """Follows a training by its workers' messages: logs metrics and models, starts previews, removes checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: CheckpointFolder,
        run: RunLog,
        *,
        say: Callable[[str], None],
        progress: Progress,
        figures: TrainFigures,
        previews: Previews,
        retention: Retention,
    ):
        """Start to follow; first, log the checkpoints and reports that an earlier, killed driver did not log."""
        self._config, self._checkpoints, self._run = config, checkpoints, run
        self._say, self._progress, self._figures = say, progress, figures
        self._previews, self._retention = previews, retention
        self._last_metrics: dict[str, float] = {}
        finished, interrupted = checkpoints.finished_steps(), checkpoints.interrupted_steps()
        # The checkpoint that was logged last may be gone: with fewer steps, training goes back to one before it.
        self._logged_step = min(last_logged_step(checkpoints), max(finished + interrupted, default=0))
        self.missed_samples: set[int] = {*_tracking_cursor(checkpoints).get("samples", ())}.intersection(finished)
        """Steps of checkpoints whose grids of samples are due, and are not being drawn yet."""
        for step in sorted(finished + interrupted):
            if step > self._logged_step:
                cursor = DataCursor.of(checkpoints.describe(step))
                for report in cursor.reports:
                    self._log_report(report)
                for validated in cursor.validations:
                    self._log_validation(validated)
                if step in interrupted:
                    self._move_cursor(step)
                else:
                    self._log_checkpoint(step)

    def on_message(self, message: Report | Validated | Saved) -> None:
        """Process a message of the workers."""
        if isinstance(message, Saved) and message.interrupted:
            self._move_cursor(message.step)
            self._figures.save()
            self._say(f"stopped after step {message.step:,}, with a checkpoint to resume from")
        elif isinstance(message, Saved):
            self._log_checkpoint(message.step)
            self._figures.save()
            self.draw_missed_samples()
            self._remove_outdated()
        elif isinstance(message, Validated):
            self._log_validation(message)
        else:
            self._log_report(message)
            self._progress.to(message.step, loss=self._last_metrics["loss"], lr=self._last_metrics["lr"])
            self.draw_missed_samples()  # of an earlier driver: not before the workers have what they need
        self._collect_samples()

    def finish(self, newest: str) -> None:
        """Wait for previews, remove outdated checkpoints, and print a summary. newest: URI of the last checkpoint."""
        self._figures.save()
        self._previews.collect(wait=True)
        self._remove_outdated(force_refresh=True)
        self._save_cursor(finished=True)
        summary = [f"{self._config.steps:,} steps"]
        if last := self._last_metrics:
            summary += [f"{last['images_per_second']:.0f} images/s", f"MFU {last['mfu']:.0%}"]
            summary += [f"data wait {last['data_wait']:.1%}"]
        self._progress.done(", ".join([*summary, f"checkpoint {newest}"]))

    def draw_missed_samples(self) -> None:
        """Start the grids that are due. Ray must run."""
        for step in sorted(self.missed_samples):
            self._previews.start(self._checkpoints.uri_of(step), step, self._checkpoints.describe(step).digest)
            self.missed_samples.discard(step)

    def _collect_samples(self) -> None:
        """Log the grids that have been drawn, which a later driver need not draw."""
        pending = self._previews.pending_steps
        self._previews.collect()
        if self._previews.pending_steps != pending:
            self._save_cursor()

    def _log_report(self, report: Report) -> None:
        self._last_metrics = add_quartile_losses(report.metrics)
        if self._is_replay(report.step, self._last_metrics["loss"]):
            return
        self._figures.add(report.step, self._last_metrics)
        self._run.metrics({f"train/{name}": value for name, value in self._last_metrics.items()}, report.step)

    def _log_validation(self, validated: Validated) -> None:
        """Log validation losses, but not again those of a step that is computed a second time."""
        step, metrics = validated.step, validated.metrics
        if all(self._figures.values(f"{VALIDATION}{name}").get(step) == value for name, value in metrics.items()):
            return
        self._figures.add_validation(step, metrics)
        self._run.metrics({f"{VALIDATION}{name}": value for name, value in metrics.items()}, step)
        if {"loss", "raw_loss"} <= metrics.keys():
            losses = f"{metrics['loss']:.4g} with averaged weights, {metrics['raw_loss']:.4g} with raw ones"
            self._say(f"step {step:,}: validation loss {losses}")

    def _is_replay(self, step: int, loss: float) -> bool:
        """Return whether the run has this step already, computed before workers died or were added.

        A step repeated after a rollback is not a replay, because it uses other images.
        """
        known = self._figures.values("loss").get(step)
        return known is not None and math.isclose(known, loss, rel_tol=REPLAY_TOLERANCE)

    def _log_checkpoint(self, step: int) -> None:
        """Log a checkpoint as a model, after the reports before it, and move the tracking cursor to its step."""
        checkpoint = self._checkpoints.describe(step)
        log_checkpoint(self._run, checkpoint, checkpoint.origin)
        if self._previews.is_due(step):
            self.missed_samples.add(step)
        self._move_cursor(step)

    def _move_cursor(self, step: int) -> None:
        """Record that tracking has everything up to the checkpoint of a step."""
        self._logged_step = step
        self._save_cursor()

    def _save_cursor(self, *, finished: bool = False) -> None:
        """Write the tracking cursor. finished: whether the driver has nothing left to do."""
        cursor: dict[str, Any] = {"step": self._logged_step, "run": self._run.key}
        if not finished:
            cursor |= {"finished": False, "samples": sorted(self.missed_samples | self._previews.pending_steps)}
        storage.write_json_atomically(storage.join(self._checkpoints.uri, TRACKING_CURSOR), cursor)

    def _remove_outdated(self, *, force_refresh: bool = False) -> None:
        if self._config.keep_last is None:
            return
        self._previews.cancel_waiting()
        # Workers may be ahead of what was logged; and previews must not lose the checkpoint that they are drawn from.
        steps = [step for step in self._checkpoints.finished_steps() if step <= self._logged_step]
        in_use = self._previews.pending_steps
        for digest in self._retention.remove_outdated(steps, in_use, force_refresh=force_refresh):
            self._run.model_removed(digest)


def last_logged_step(checkpoints: CheckpointFolder) -> int:
    """Return the step of the newest checkpoint that was logged to tracking, with all reports before it; -1 if none."""
    return _tracking_cursor(checkpoints).get("step", -1)


def logged_run(checkpoints: CheckpointFolder) -> str | None:
    """Return the key of the run that the checkpoints were logged to; None if it was not recorded."""
    return _tracking_cursor(checkpoints).get("run")


def is_completed(checkpoints: CheckpointFolder) -> bool:
    """Return whether the driver that logged the newest checkpoint came to its end; True if that was not recorded."""
    return _tracking_cursor(checkpoints).get("finished", True)


def _tracking_cursor(checkpoints: CheckpointFolder) -> dict[str, Any]:
    file = storage.join(checkpoints.uri, TRACKING_CURSOR)
    return storage.read_json(file) if storage.exists(file) else {}
