"""Figures of a training in MLflow: loss by timestep, throughput, and where the time went."""

from cluster import storage
from evaluation.plots.over_steps import plot_lines
from evaluation.plots.time_shares import plot_time_shares
from pipelines.config.training import VALIDATION
from pipelines.images.grids import save_png
from pipelines.tracking.run_log import FIGURES, RunLog

QUARTERS = {f"loss_quartile_{q + 1}": f"t in {25 * q} to {25 * q + 25}%" for q in range(4)}
"""Labels of the quarters of the timesteps, by the names of their losses in `pipelines.training.metrics`."""
LOSSES = {
    "loss": "training",
    f"{VALIDATION}loss": "held-out, averaged weights",
    f"{VALIDATION}raw_loss": "held-out, raw weights",
}
"""Labels of the losses that are compared."""


class TrainFigures:
    """Figures that are redrawn at every checkpoint from all reports of the run, also those of earlier commands."""

    def __init__(self, run: RunLog, folder: str, images_per_step: int):
        """folder: path or URI for the files. images_per_step: the global batch size."""
        self._run, self._folder, self._images_per_step = run, folder, images_per_step
        self._points: dict[str, dict[int, float]] = run.points("train/")
        self._points |= {f"{VALIDATION}{name}": points for name, points in run.points(VALIDATION).items()}

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics of a report."""
        for name, value in metrics.items():
            self._points.setdefault(name, {})[step] = value

    def add_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Add the validation losses after a step."""
        self.add(step, {f"{VALIDATION}{name}": value for name, value in metrics.items()})

    def values(self, name: str) -> dict[int, float]:
        """Return what the run has of a metric, by step, also from earlier commands: "loss", "validation/loss"."""
        return self._points.get(name, {})

    def save(self) -> None:
        """Draw the figures and keep them with the run, replacing earlier ones; do nothing before the first report."""
        if "images_per_second" not in self._points:
            return
        losses = {label: list(self._points.get(name, {}).items()) for name, label in QUARTERS.items()}
        speed = {"images/s": list(self._points["images_per_second"].items())}
        pictures = {
            "loss_by_timestep": plot_lines("Loss by timestep", losses, label="loss"),
            "throughput": plot_lines("Images per second, all workers together", speed, label="images/s"),
            "time": plot_time_shares("Where the time of the training loop went", {"training loop": self.seconds()}),
        }
        if f"{VALIDATION}loss" in self._points:
            lines = {label: list(self.values(name).items()) for name, label in LOSSES.items()}
            pictures["validation_loss"] = plot_lines("Loss of training and held-out images", lines, label="loss")
        for name, picture in pictures.items():
            self._run.artifact(save_png(picture, storage.join(self._folder, f"{name}.png")), FIGURES)

    def seconds(self) -> dict[str, float]:
        """Return the seconds that the training loop spent on steps, and waiting for data and for checkpoints."""
        parts = {"steps": 0.0, "data wait": 0.0, "checkpoints": 0.0}
        before = 0
        for step, speed in sorted(self._points["images_per_second"].items()):
            seconds = (step - before) * self._images_per_step / speed
            waits = [self._points.get(name, {}).get(step, 0.0) for name in ("data_wait", "checkpoint_wait")]
            for name, share in zip(parts, (1 - sum(waits), *waits), strict=True):
                parts[name] += share * seconds
            before = step
        return parts
