"""One process of a Ray Train group: its device and share, its data-parallel network, its checkpoints, its word."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as distributed

from pipelines.config.training import ElasticWorkersConfig
from pipelines.training.messages import Message, Notice, Report, Saved

if TYPE_CHECKING:
    from dit.snapshot import Snapshot
    from dit.train import TrainState


class Worker:
    """This process's place in the group. What says "all" must be called by all workers, at the same step."""

    def __init__(self, rank: int, num_workers: int, device: torch.device, tell: Callable[[Message], object]):
        """tell: sends a message to the driver."""
        self.rank, self.num_workers, self.device, self.tell = rank, num_workers, device, tell

    @classmethod
    def of_group(cls, workers: ElasticWorkersConfig, mailbox) -> "Worker":
        """This process's, in the Ray Train group that it belongs to."""
        import ray.train
        import ray.train.torch

        torch.set_num_threads(workers.cpus_per_worker)
        context = ray.train.get_context()
        device = ray.train.torch.get_device() if workers.gpus_per_worker else torch.device("cpu")
        return cls(context.get_world_rank(), context.get_world_size(), device, mailbox.put.remote)

    def wrap(self, network: torch.nn.Module, *, strategy: str = "ddp", compiled: bool = False) -> torch.nn.Module:
        """The network as what is called in training: itself, or data-parallel over the group. All."""
        from dit.distributed import replicate_network, shard_network

        model = network
        if strategy == "fsdp":
            model = shard_network(network)
        elif self.num_workers > 1:
            model = replicate_network(network, self.device)
        if compiled:
            model.compile()  # in place: the wrapper and the names of the weights stay
        return model

    def notice(self, text: str) -> None:
        """Let people read something, once for the group."""
        if self.rank == 0:
            self.tell(Notice(text))

    def report(self, step: int, metrics: dict[str, float]) -> Report:
        """Send the mean over all workers to the driver, and return it. All."""
        report = Report(step, self._mean(metrics))
        if self.rank == 0:
            self.tell(report)
        return report

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.num_workers == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(metrics, (values / self.num_workers).tolist(), strict=True))

    def gather(self, value) -> list:
        """Every worker's value, by rank. All."""
        if self.num_workers == 1:
            return [value]
        values: list = [None] * self.num_workers
        distributed.all_gather_object(values, value)
        return values


class CheckpointWriter:
    """Writes checkpoints while training goes on: a step waits for the copy to memory, not for the disk.

    One is written at a time. What goes wrong in writing is raised by the next call.
    """

    def __init__(self, worker: Worker, write: "Callable[[Snapshot], object]"):
        """write: puts a snapshot where checkpoints are; called in the process of rank 0."""
        self._worker, self._write = worker, write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: "TrainState") -> None:
        """Take a snapshot, and begin to write it. All."""
        from dit.snapshot import take_snapshot

        self.wait()
        if snapshot := take_snapshot(state, keep=self._worker.rank == 0):
            self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Return when what was begun is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _run(self, snapshot: "Snapshot") -> None:
        try:
            self._write(snapshot)
            self._worker.tell(Saved(snapshot.step))
        except BaseException as error:
            self._error = error
