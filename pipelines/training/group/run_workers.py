"""Run a training function on a group of Ray Train workers, and restart the group when workers die.

Checkpoints are raydit's own: named by step, published atomically, and found again by any later process. Ray Train
therefore only provides the process group, the placement of workers, and a number of workers that may change.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cluster import signals, storage
from cluster.threads import run_beside
from pipelines.config.training import ElasticWorkersConfig, TrainConfig
from pipelines.console import first_line
from pipelines.stage import JobContext
from pipelines.training.group.failures import Restarts, first_cause
from pipelines.training.group.messages import (
    POLL_SECONDS,
    InLoop,
    Message,
    Notice,
    Report,
    Saved,
    Validated,
    receive_messages,
    start_mailbox,
)
from pipelines.training.group.worker import Worker
from raydit.compilers import explain_failed_compilation, require_compiler

if TYPE_CHECKING:
    from ray.train import RunConfig, ScalingConfig

RAY_FOLDER = ".ray"
"""Folder of the output for Ray Train's own files."""
RESIZE_SECONDS = 60.0
"""How often an elastic group checks whether more workers fit; growing restarts it from its newest checkpoint."""
STOP_SECONDS = 15.0
"""Time that workers have to end with a checkpoint when a signal asks for it; most senders kill after 20 or 30 s."""

ANSWER_SECONDS = 5.0
"""Time in which a living mailbox answers."""

Settings = TypeVar("Settings")


def run_workers(
    context: JobContext,
    stage: str,
    workers: ElasticWorkersConfig,
    function: Callable[[Worker, Settings], None],
    settings: Settings,
    on_message: Callable[[Report | Validated | Saved], None],
    *,
    ray_folder: str,
) -> None:
    """Run `function(worker, settings)` on every worker of a Ray Train group, and wait for the end.

    on_message: called in this process with the workers' reports and saved checkpoints; notices are printed.
    ray_folder: path or URI for Ray Train's own files. Raises the error of the worker that failed, and WorkersDied if
    workers keep dying. On a signal, workers end their training loop with a checkpoint, and KeyboardInterrupt is raised.
    """
    context.start_ray(workers, stage)
    import ray

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    with ThreadPoolExecutor(1, thread_name_prefix="mailbox") as pool:
        started = pool.submit(start_mailbox)  # while this process imports
        from ray.train import TrainingFailedError

        from pipelines.training.group.rendezvous import torch_group
        from pipelines.training.group.trainer import GroupTrainer

    request = signals.StopRequest()
    stop, restarts = GroupStop(request), Restarts(context, stage)

    def receive(message: Message) -> None:
        if isinstance(message, Notice):
            context.say(stage, message.text)
            return
        if isinstance(message, InLoop):
            stop.in_loop = message.active
            return
        if isinstance(message, Saved):
            restarts.on_checkpoint()
        on_message(message)

    with (
        signals.stop_on_signal(request),
        torch_group(workers) as group_config,
        receive_messages(receive, started.result()) as mailbox,
        stop.watching(mailbox),
    ):
        # Put aside, because the controller would import the modules of function and settings, and torch with them.
        work = ray.put((function, settings, workers, mailbox))
        while True:
            stop.in_loop = False
            trainer = GroupTrainer(
                _run_worker,
                backend_config=group_config,
                train_loop_config={"work": work},
                scaling_config=_scaling_config(workers),
                run_config=_run_config(stage, ray_folder),
            )
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                failure = first_cause(error)
                if request.requested:
                    context.say(stage, f"could not write a checkpoint of the last step: {first_line(failure)}")
                    raise signals.Interrupted from error
                restarts.restart_or_raise(failure, error)


class GroupStop:
    """Passes the request of a signal on to the workers, and waits until they have ended, but not forever."""

    def __init__(self, request: signals.StopRequest):
        self._request = request
        self.in_loop = False
        """Whether the workers are in the training loop, which ends when its last checkpoint is complete.

        In any other phase they would not notice the request.
        """

    @contextmanager
    def watching(self, mailbox: Any) -> Iterator[None]:
        """Act on the request, in a thread, for the duration of the block. mailbox: handle of a Mailbox actor."""
        with run_beside("stop", self._watch, mailbox):
            yield

    def _watch(self, mailbox: Any, ended: threading.Event) -> None:
        import ray

        while not self._request.requested:
            if ended.wait(POLL_SECONDS):
                return
        requested_at, answer = time.monotonic(), mailbox.stop.remote()
        while not ended.wait(POLL_SECONDS):
            seconds = time.monotonic() - requested_at
            # The signal may have ended Ray's processes too, as systemd does; then nothing answers any more.
            answered = bool(ray.wait([answer], timeout=0)[0])
            if not self.in_loop or seconds > (STOP_SECONDS if answered else ANSWER_SECONDS):
                self._request.give_up()
                return


def _run_worker(train_loop_config: dict[str, Any]) -> None:
    """Run in every process of the group: unpack the dict that Ray Train requires."""
    import ray

    from dit.hardware.device_errors import explain_full_memory

    function, settings, workers, mailbox = ray.get(train_loop_config["work"])
    if getattr(workers, "compile", None):
        require_compiler(bool(workers.gpus_per_worker))
    with explain_failed_compilation(), explain_full_memory(_less_memory(workers)):
        function(Worker.of_ray_train(workers, mailbox), settings)


def _less_memory(workers: ElasticWorkersConfig) -> str:
    """Return what to do if the workers' memory is not enough."""
    smaller = "raise autoencoder.train.accumulation_steps"
    if isinstance(workers, TrainConfig):
        smaller = "raise train.accumulation_steps, or set train.gradient_checkpointing = true"
    return f"{smaller} (`raydit plan` says what fits), and run the same command again: it resumes"


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
    path = storage.quoted(storage_path)  # pyarrow, by which Ray opens it, takes no blanks
    return RunConfig(name=stage, storage_path=path, failure_config=FailureConfig(max_failures=0))
