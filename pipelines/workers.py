"""Ray Train, once for every stage that learns: a group of workers that runs a training loop and reports.

Checkpoints are ours: named by step, published atomically, found again by whoever comes next. So Ray Train's
part is the process group, placement, and starting the group again when a worker dies.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.config import WorkersConfig
from pipelines.stage import StageContext

RESTARTS = 3
"""How often a group is started again after a worker died, before the stage fails."""


@dataclass(frozen=True)
class Report:
    """What the workers tell of a step: means over all of them."""

    step: int
    metrics: dict[str, float]


def run_workers(
    context: StageContext,
    stage: str,
    workers: WorkersConfig,
    function: Callable[[dict], None],
    settings: dict,
    on_report: Callable[[Report], None],
) -> None:
    """Run `function(settings)` on every worker of a Ray Train group and hand their reports to `on_report`, here.

    `settings["reports"]` is where each `Worker` reports to. Raises the worker's own error where there is one.
    """
    context.start_ray(workers, stage)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    scratch = context.config.folder(".ray")
    resources = {"CPU": float(workers.cpus_per_worker)}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    with _mailbox(on_report) as mailbox:
        for restarts in range(RESTARTS + 1):
            trainer = TorchTrainer(
                function,
                train_loop_config={**settings, "reports": mailbox},
                scaling_config=ScalingConfig(
                    num_workers=workers.num_workers,
                    use_gpu=bool(workers.gpus_per_worker),
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    # Restarting is ours: Ray Train would also try again what fails for a reason that stays.
                    name=stage,
                    storage_path=str(scratch),
                    failure_config=FailureConfig(max_failures=0),
                ),
            )
            try:
                return _fit_interruptibly(trainer)
            except TrainingFailedError as error:
                failure = _own_error(error)
                if restarts == RESTARTS or not _may_pass(failure):
                    raise failure from error
                context.say(stage, f"a worker died ({_first_line(failure)}); starting the group again")


def _fit_interruptibly(trainer) -> None:
    """Run `trainer.fit()` in a thread: in the main one it takes Ctrl-C for itself, for good, and exits with 1.

    Here KeyboardInterrupt ends the wait; the workers end with the Ray session, and the next run takes the newest
    checkpoint.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    if errors:
        raise errors[0]


def _own_error(error: Exception) -> BaseException:
    """What a worker raised on purpose, before the errors of those that waited for it."""
    failures = getattr(error, "worker_failures", {}).values()
    return next(iter(sorted(failures, key=_may_pass)), error)


def _may_pass(failure: BaseException) -> bool:
    """Whether a worker died, or lost one that did, rather than met what the next try meets again."""
    return not isinstance(failure, ValueError | OSError | ArithmeticError)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _mailbox(on_report: Callable[[Report], None]):
    """An actor that workers send reports to, emptied into `on_report` by a thread of this process."""
    import ray

    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    ended = threading.Event()

    def empty() -> None:
        while True:
            last = ended.wait(0.5)
            for report in ray.get(mailbox.take.remote()):
                on_report(report)
            if last:
                return

    thread = threading.Thread(target=empty, name="reports", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(mailbox)


class Mailbox:
    """Reports on their way from a worker to the driver."""

    def __init__(self) -> None:
        self._reports: list[Report] = []

    def put(self, report: Report) -> None:
        self._reports.append(report)

    def take(self) -> list[Report]:
        reports, self._reports = self._reports, []
        return reports


class Worker:
    """This process's place in the group: device, share of the batch, data-parallel wrapping, reporting."""

    def __init__(self, settings: dict, workers: WorkersConfig):
        import torch
        from ray import train

        torch.set_num_threads(workers.cpus_per_worker)
        context = train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = train.torch.get_device() if workers.gpus_per_worker else torch.device("cpu")
        self._reports = settings["reports"]

    def wrap(self, network):
        """The network as what is called in training: itself, or data-parallel over the group."""
        if self.num_workers == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        # On CPUs communication takes the cores that it would overlap with: one bucket costs least.
        bucket_mb = 25 if self.device.type == "cuda" else 1000
        return DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Send the mean over all workers to the driver; every worker must call it at the same steps."""
        means = self._mean(metrics)
        if self.rank == 0:
            self._reports.put.remote(Report(step, means))

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.num_workers == 1:
            return metrics
        import torch
        import torch.distributed as distributed

        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(metrics, (values / self.num_workers).tolist(), strict=True))
