"""One worker of a training group: its rank and device, its data-parallel network, its reports and its checkpoints."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as distributed

from pipelines.config.training import ElasticWorkersConfig
from pipelines.console import first_line
from pipelines.training.group.messages import InLoop, MailboxQuestion, Message, Notice, Report, Saved

if TYPE_CHECKING:
    from dit.metrics_window import WindowTotals
    from dit.snapshot import Snapshot
    from dit.train import TrainState

Value = TypeVar("Value")

RETRY_SECONDS = (10.0, 60.0, 300.0)
"""Pauses before a checkpoint that could not be written is tried again: a store may answer, or a disk have room."""


class Worker:
    """One process of the training group. Methods marked "Collective" must be called by all workers at the same step."""

    def __init__(
        self,
        rank: int,
        num_workers: int,
        device: torch.device,
        send: Callable[[Message], object],
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        """send: sends a message to the driver. stop_requested: whether the driver asked to stop; asked of rank 0."""
        self.rank, self.num_workers, self.device, self.send = rank, num_workers, device, send
        self.stop_requested = stop_requested

    @classmethod
    def of_ray_train(cls, workers: ElasticWorkersConfig, mailbox: Any) -> "Worker":
        """Return the worker that this process is in its Ray Train group. mailbox: handle of a Mailbox actor."""
        import ray.train
        import ray.train.torch

        torch.set_num_threads(workers.cpus_per_worker)
        context = ray.train.get_context()
        device = ray.train.torch.get_device() if workers.gpus_per_worker else torch.device("cpu")
        rank = context.get_world_rank()
        question = [MailboxQuestion(mailbox)] if rank == 0 else []
        return cls(rank, context.get_world_size(), device, mailbox.put.remote, *question)

    def wrap(
        self, network: torch.nn.Module, *, strategy: str = "ddp", compiled: bool = False, some_unused: bool = False
    ) -> torch.nn.Module:
        """Return the module to call in training: the network itself, or its data-parallel wrapper. Collective.

        some_unused: whether parameters take no part in some steps.
        """
        from dit.compilation import compile_network
        from dit.distributed import replicate_network, shard_network

        if compiled:
            compile_network(network)
        if strategy == "fsdp":
            return shard_network(network)
        if self.num_workers > 1:
            return replicate_network(network, self.device, some_unused=some_unused)
        return network

    def notice(self, text: str) -> None:
        """Show a line to the user, once for the whole group."""
        if self.rank == 0:
            self.send(Notice(text))

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """Tell the driver that all workers are in the training loop for the duration of the block."""
        if self.rank == 0:
            self.send(InLoop(True))
        yield
        if self.rank == 0:
            self.send(InLoop(False))

    def report(self, step: int, metrics: dict[str, float]) -> Report:
        """Send the mean of metrics over all workers to the driver, and return it. Collective."""
        report = Report(step, self._mean(metrics))
        if self.rank == 0:
            self.send(report)
        return report

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.num_workers == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(metrics, (values / self.num_workers).tolist(), strict=True))

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all workers, by rank. Collective."""
        if self.num_workers == 1:
            return [value]
        values: list[Any] = [None] * self.num_workers
        distributed.all_gather_object(values, value)
        return values

    def mean_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all workers. Collective."""
        if self.num_workers > 1:
            distributed.all_reduce(tensor)
            tensor = tensor / self.num_workers
        return tensor

    def wait_for_all(self) -> None:
        """Return once all workers have called it. Collective."""
        self.gather(None)


class CheckpointWriter:
    """Writes checkpoints in a thread, so that training waits for the copy to memory but not for the disk.

    One checkpoint is written at a time. One that cannot be written is tried again while training continues, after
    RETRY_SECONDS, and then given up: `raise_error` and `wait` raise the error, unless a later one was written since.
    """

    def __init__(self, worker: Worker, write: "Callable[[Snapshot, list[WindowTotals]], None]"):
        """write: writes a snapshot to storage, with the open windows of all workers, by rank, if training was stopped.

        It is called in the process of rank 0 only.
        """
        self._worker, self._write = worker, write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._has_newer = threading.Event()

    def save(self, state: "TrainState") -> None:
        """Take a snapshot of the state and start to write it. Collective."""
        from dit.snapshot import take_snapshot

        self._has_newer.set()
        self._join()
        if self._error is not None:
            self._worker.notice(f"a checkpoint before step {state.step:,} is missing: {first_line(self._error)}")
        windows = [] if state.open_window is None else self._worker.gather(state.open_window)
        if snapshot := take_snapshot(state, keep=self._worker.rank == 0):
            self._error = None
            self._has_newer.clear()
            self._thread = threading.Thread(target=self._run, args=(snapshot, windows), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        self._join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error of the last checkpoint if it was given up."""
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, snapshot: "Snapshot", windows: "list[WindowTotals]") -> None:
        try:
            self._try_to_write(snapshot, windows)
            self._worker.send(Saved(snapshot.step, snapshot.interrupted))
        except BaseException as error:
            self._error = error

    def _try_to_write(self, snapshot: "Snapshot", windows: "list[WindowTotals]") -> None:
        """Write a snapshot; after an error of the disk or store several times, but once more if a newer one waits."""
        for seconds in RETRY_SECONDS:
            try:
                return self._write(snapshot, windows)
            except OSError as error:
                if self._has_newer.is_set():
                    raise
                step, reason = snapshot.step, first_line(error)
                self._worker.notice(
                    f"could not write the checkpoint of step {step:,} ({reason}); trying again in {seconds:g} s"
                )
            self._has_newer.wait(seconds)
        self._write(snapshot, windows)
