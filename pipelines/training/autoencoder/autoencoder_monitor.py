"""What the driver does while workers train an autoencoder: progress, metrics, and the figures of the result."""

from pathlib import Path

from cluster import storage
from pipelines.console import Progress
from pipelines.tracking.run_log import RunLog
from pipelines.training.autoencoder.autoencoder_result import RECONSTRUCTIONS, REPORT, AutoencoderRecord
from pipelines.training.autoencoder.autoencoder_worker import TRAINING
from pipelines.training.group.messages import Report, Saved, Validated


class AutoencoderMonitor:
    """Follows the training of an autoencoder by its workers' messages: shows progress, and logs metrics once."""

    def __init__(self, run: RunLog, progress: Progress):
        """Start to follow. run: may hold metrics of an interrupted command, also after its newest checkpoint."""
        self._run, self._progress = run, progress
        self._logged = run.points("autoencoder/")

    def on_message(self, message: Report | Validated | Saved) -> None:
        """Process a message of the workers."""
        if isinstance(message, Report):
            self._progress.to(message.step, mse=message.metrics["mse"])
            self._log(message.step, message.metrics)
        elif isinstance(message, Validated):
            self._log(message.step, {f"validation/{name}": value for name, value in message.metrics.items()})

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step, unless it was computed before an interruption."""
        if all(step in self._logged.get(name, {}) for name in metrics):
            return
        for name, value in metrics.items():
            self._logged.setdefault(name, {})[step] = value
        self._run.metrics({f"autoencoder/{name}": value for name, value in metrics.items()}, step)


def finish_run(run: RunLog, record: AutoencoderRecord, folder: str, step: int) -> None:
    """Log the result, unless an interrupted command has, and remove what the training needed besides."""
    if step not in run.points("autoencoder/").get("psnr", {}):
        log_result(run, record, folder, step)
    # Last, because a folder that is still there tells the next command that this was interrupted.
    storage.remove_folder(storage.join(folder, TRAINING))


def log_result(run: RunLog, record: AutoencoderRecord, folder: str, step: int) -> None:
    """Log the figures of the report and the picture of reconstructions, at the last step."""
    report = storage.read_json(storage.join(folder, REPORT))
    measured = {name: value for name, value in report.items() if isinstance(value, float)}
    run.metrics({f"autoencoder/{name}": value for name, value in {**measured, "psnr": record.psnr}.items()}, step)
    picture = Path(storage.local_folder_for(folder)) / RECONSTRUCTIONS
    if not storage.is_local(folder):
        storage.write_atomically(str(picture), storage.read_bytes(storage.join(folder, RECONSTRUCTIONS)))
    run.image(picture, "reconstructions", step)
