"""Ray Train, once for every stage that learns: a group of workers that runs a training loop and tells how it goes.

Checkpoints are ours: named by step, published atomically, found again by whoever comes next. So Ray Train's
part is the process group, placement, and the number of workers where that may change.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from pipelines.config.training import ElasticWorkersConfig
from pipelines.console import first_line
from pipelines.stage import StageContext
from pipelines.training.messages import Mailbox, Message, Notice, Report, Saved

RESIZE_SECONDS = 60.0
"""How often a group that may grow looks for room; to grow it starts again from its newest checkpoint."""
RESTARTS = 3
"""How often a group is started again after workers died without a further checkpoint, before the stage fails."""


def run_workers(
    context: StageContext,
    stage: str,
    workers: ElasticWorkersConfig,
    function: Callable[[dict], None],
    settings: dict,
    on_message: Callable[[Report | Saved], None],
) -> None:
    """Run `function(settings)` on every worker of a Ray Train group and hand what they tell to `on_message`, here.

    `settings["mailbox"]` is where each `pipelines.training.worker.Worker` tells it. Raises the worker's own error where
    there is one.
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

    with _mailbox(receive) as mailbox:
        while True:
            trainer = TorchTrainer(
                function,
                train_loop_config={**settings, "mailbox": mailbox},
                scaling_config=_scaling(workers),
                run_config=_run_config(context, stage),
            )
            try:
                return _fit_interruptibly(trainer)
            except TrainingFailedError as error:
                failure = _own_error(error)
                if restarts == RESTARTS or not _may_pass(failure):
                    raise failure from error
                restarts += 1
                context.say(stage, f"a worker died ({first_line(failure)}); starting the group again")


def _scaling(workers: ElasticWorkersConfig):
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


def _run_config(context: StageContext, stage: str):
    from ray.train import FailureConfig, RunConfig

    # Restarting is ours: Ray Train would also try again what fails for a reason that stays.
    storage_path = str(context.config.folder(".ray"))
    return RunConfig(name=stage, storage_path=storage_path, failure_config=FailureConfig(max_failures=0))


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


def _lost(error: Exception) -> Exception:
    return ChildProcessError(
        f"the process that takes the workers' messages was lost ({first_line(error)}): they have ended, but tracking "
        "has not heard of all. Checkpoints hold what is missing: the same command tells it"
    )


@contextmanager
def _mailbox(receive: Callable[[Message], None]):
    """An actor that workers tell, emptied into `receive` by a thread of this process.

    It is on this process's node: the loss of any other costs no message. What `receive` raises is logged, and raised
    when the workers have ended; the loss of the actor as well.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    ended = threading.Event()
    errors: list[Exception] = []

    def empty() -> None:
        while True:
            last = ended.wait(0.5)
            try:
                messages = ray.get(mailbox.take.remote())
            except ray.exceptions.RayActorError as error:
                errors.append(_lost(error))
                return
            for message in messages:
                try:
                    receive(message)
                except Exception as error:  # the workers go on, and so must the messages after this one
                    logging.getLogger(__name__).exception("a message of the workers could not be dealt with")
                    errors.append(error)
            if last:
                return

    thread = threading.Thread(target=empty, name="messages", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(mailbox)
    if errors:
        raise errors[0]
