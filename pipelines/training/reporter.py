"""A worker's reports to the driver, which the next checkpoint also contains in case the driver is killed."""

import threading

from dit.hardware.peak_speed import peak_flops
from dit.macs import forward_macs
from pipelines.training.cursor import DataCursor
from pipelines.training.group.messages import Report, Validated
from pipelines.training.group.worker import Worker
from pipelines.training.metrics import peak_memory_gib
from pipelines.training.settings import TrainWorkerSettings


class Reporter:
    """Sends the loop's metrics and the validation losses to the driver, and keeps them for the next checkpoint.

    Only in the process of rank 0: the other workers write no checkpoints and would keep them forever.
    """

    def __init__(self, settings: TrainWorkerSettings, worker: Worker, earlier: DataCursor | None):
        """earlier: cursor of the checkpoint at which training was interrupted, if it was."""
        self._worker = worker
        self._flops_per_image = 6 * forward_macs(settings.model)  # 2 a MAC; backward costs twice the forward pass
        self._peak_flops = worker.num_workers * peak_flops(worker.device, settings.train.dtype)
        self._kept: list[Report | Validated] = []
        self._lock = threading.Lock()  # the loop adds to what is kept, the thread that writes checkpoints drops it
        if earlier is not None and worker.rank == 0:
            self._kept = [*earlier.reports, *earlier.validations]

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Add model FLOPs utilisation and memory to the metrics, and send their means over workers. Collective."""
        mfu = metrics["images_per_second"] * self._flops_per_image / self._peak_flops
        memory = peak_memory_gib(self._worker.device)
        sent = self._worker.report(step, metrics | {"mfu": mfu, "memory_gib": memory})
        if self._worker.rank == 0:
            self._keep(sent)

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """Send the validation losses after a step, which are equal in all workers."""
        if self._worker.rank == 0:
            validated = Validated(step, metrics)
            self._keep(validated)
            self._worker.send(validated)

    def kept_until(self, step: int) -> tuple[list[Report], list[Validated]]:
        """Return the reports and the validation losses up to a step that no checkpoint has."""
        with self._lock:
            kept = [each for each in self._kept if each.step <= step]
        reports = [each for each in kept if isinstance(each, Report)]
        return reports, [each for each in kept if isinstance(each, Validated)]

    def forget_until(self, step: int) -> None:
        """Drop what is kept up to a step, because its checkpoint is complete."""
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.step > step]

    def _keep(self, sent: Report | Validated) -> None:
        with self._lock:
            self._kept.append(sent)
