"""Run a training function on a group of Ray Train workers, and restart the group when workers die.

Checkpoints are raydit's own: named by step, published atomically, and found again by any later process. Ray Train
therefore only provides the process group, the placement of workers, and a number of workers that may change.
"""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.config.training import ElasticWorkersConfig
from pipelines.console import first_line
from pipelines.stage import JobContext
from pipelines.training.messages import Message, Notice, Report, Saved, receive_messages
from pipelines.training.worker import Worker
from raydit.errors import RayditError, WorkersDied

if TYPE_CHECKING:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

RAY_FOLDER = ".ray"
"""Folder of the output for Ray Train's own files."""
RESIZE_SECONDS = 60.0
"""How often an elastic group checks whether more workers fit; growing restarts it from its newest checkpoint."""
MAX_RESTARTS = 3
"""Restarts of the group after workers died, without a new checkpoint in between, before the stage fails."""

Settings = TypeVar("Settings")


def run_workers(
    context: JobContext,
    stage: str,
    workers: ElasticWorkersConfig,
    function: Callable[[Worker, Settings], None],
    settings: Settings,
    on_message: Callable[[Report | Saved], None],
    *,
    ray_folder: str,
) -> None:
    """Run `function(worker, settings)` on every worker of a Ray Train group, and wait for the end.

    on_message: called in this process with the workers' reports and saved checkpoints; notices are printed.
    ray_folder: path or URI for Ray Train's own files. Raises the error of the worker that failed, and WorkersDied if
    workers keep dying.
    """
    context.start_ray(workers, stage)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer

    restarts = 0

    def receive(message: Message) -> None:
        nonlocal restarts
        if isinstance(message, Notice):
            context.say(stage, message.text)
            return
        if isinstance(message, Saved):
            restarts = 0
        on_message(message)

    with receive_messages(receive) as mailbox:
        while True:
            trainer = TorchTrainer(
                _run_worker,
                train_loop_config={"function": function, "settings": settings, "workers": workers, "mailbox": mailbox},
                scaling_config=_scaling_config(workers),
                run_config=_run_config(stage, ray_folder),
            )
            try:
                return _fit_interruptibly(trainer)
            except TrainingFailedError as error:
                failure = _first_cause(error)
                if not _is_retryable(failure):
                    raise failure from error
                if restarts == MAX_RESTARTS:
                    raise _died_repeatedly(stage, failure) from error
                restarts += 1
                context.say(stage, f"a worker died ({first_line(failure)}); restarting all workers")


def _run_worker(train_loop_config: dict[str, Any]) -> None:
    """Run in every process of the group: unpack the dict that Ray Train requires."""
    worker = Worker.of_ray_train(train_loop_config["workers"], train_loop_config["mailbox"])
    train_loop_config["function"](worker, train_loop_config["settings"])


def _scaling_config(workers: ElasticWorkersConfig) -> "ScalingConfig":
    from ray.train import ScalingConfig

    resources = {"CPU": float(workers.cpus_per_worker)}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    settings: dict[str, Any] = {
        "num_workers": workers.num_workers,
        "use_gpu": bool(workers.gpus_per_worker),
        "resources_per_worker": resources,
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
        **workers.placement,
    }
    return ScalingConfig(**settings)  # unpacked: mypy sees the class of Ray Train's first version


def _run_config(stage: str, storage_path: str) -> "RunConfig":
    from ray.train import FailureConfig, RunConfig

    # run_workers restarts the group itself: Ray Train would also retry errors that are certain to recur.
    return RunConfig(name=stage, storage_path=storage_path, failure_config=FailureConfig(max_failures=0))


def _fit_interruptibly(trainer: "TorchTrainer") -> None:
    """Run `trainer.fit()` in a thread: in the main thread it would keep Ctrl-C for itself and exit with code 1.

    Here KeyboardInterrupt ends the wait; the workers end with the Ray session, and the next run resumes from the newest
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


def _first_cause(error: Exception) -> BaseException:
    """Return the error that a worker raised on purpose, rather than those of workers that lost contact with it."""
    failures = getattr(error, "worker_failures", {}).values()
    return next(iter(sorted(failures, key=_is_retryable)), error)


def _is_retryable(failure: BaseException) -> bool:
    """Return whether a worker died or lost contact with one that did; other errors would recur in the next attempt."""
    return not isinstance(failure, RayditError | ValueError | OSError | ArithmeticError)


def _died_repeatedly(stage: str, failure: BaseException) -> BaseException:
    """Return the error to raise after the last restart: a dead worker's is for the user, any other is a bug's own."""
    if not type(failure).__module__.startswith("ray."):
        return failure
    return WorkersDied(
        f"{stage}: workers died {MAX_RESTARTS + 1} times without a new checkpoint in between, the last time because: "
        f"{first_line(failure)}",
        "workers that have the memory and the device that they need",
        "read Ray's logs on their node (/tmp/ray/session_latest/logs), then run the same command again to resume",
    )
