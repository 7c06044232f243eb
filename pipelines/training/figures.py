"""Figures of a training in MLflow: loss by timestep, throughput, and where the time went."""

from cluster import storage
from pipelines.figures import FIGURES, lines_figure, time_figure
from pipelines.images.grids import save_png

QUARTERS = {f"loss_quartile_{q + 1}": f"t in {25 * q} to {25 * q + 25}%" for q in range(4)}
"""Of the timesteps, as `pipelines.training.metrics` names the losses in them."""


class TrainFigures:
    """Drawn anew at every checkpoint, over all that the run was told, by earlier commands too."""

    def __init__(self, run, folder: str, images_per_step: int):
        """run: a RunLog. folder: path or URI, for the files."""
        self._run, self._folder, self._images_per_step = run, folder, images_per_step
        self._points: dict[str, dict[int, float]] = run.points("train/")

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Take a report's metrics."""
        for name, value in metrics.items():
            self._points.setdefault(name, {})[step] = value

    def save(self) -> None:
        """Draw, and keep with the run, in place of the figures before; nothing without a report."""
        if "images_per_second" not in self._points:
            return
        lines = {text: list(self._points.get(name, {}).items()) for name, text in QUARTERS.items()}
        speed = {"images/s": list(self._points["images_per_second"].items())}
        pictures = {
            "loss_by_timestep": lines_figure("loss by timestep", lines),
            "throughput": lines_figure("images per second, all workers together", speed),
            "time": time_figure("where the time of the training loop went", {"training loop": self.seconds()}),
        }
        for name, picture in pictures.items():
            self._run.artifact(save_png(picture, storage.join(self._folder, f"{name}.png")), FIGURES)

    def seconds(self) -> dict[str, float]:
        """What the loop has spent on steps, and on waiting for data and for checkpoints."""
        parts = {"steps": 0.0, "data wait": 0.0, "checkpoints": 0.0}
        before = 0
        for step, speed in sorted(self._points["images_per_second"].items()):
            seconds = (step - before) * self._images_per_step / speed
            waits = [self._points.get(name, {}).get(step, 0.0) for name in ("data_wait", "checkpoint_wait")]
            for name, share in zip(parts, (1 - sum(waits), *waits), strict=True):
                parts[name] += share * seconds
            before = step
        return parts
