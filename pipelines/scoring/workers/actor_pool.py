"""Run tasks on a pool of Ray actors; a task whose actor dies is retried on another one.

Ray Data could distribute the tasks as well. It keeps three actors and a polling thread busy next to the workers, and
its blocks would be empty: a task consists of a few names, and its result is a file.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from cluster import storage
from dit.hardware.device_errors import explain_full_memory
from pipelines.config.training import WorkersConfig
from pipelines.console import first_line
from raydit.compilers import explain_failed_compilation
from raydit.errors import WorkersDied

Task = TypeVar("Task")
MAX_DEATHS = 3
"""Actors that may die of one task; or, times the size of the pool, in a row before any has started."""
LESS_MEMORY = "lower evaluate.batch_size (of an autoencoder, encode.batch_size), and run the same command again"
"""What to do if the memory of an actor is not enough."""


class PoolWorker(Generic[Task]):
    """The actor: it creates the function that runs tasks in its own process."""

    def __init__(self, create: Callable[[], Callable[[Task], None]], shared: Sequence[storage.SharedFolder] = ()):
        """shared: folders that tasks write into, which must be the same ones on all machines."""
        self._create, self._shared = create, shared

    def start(self) -> None:
        """Create the function. Not done in __init__, because Ray passes errors of constructors on as text."""
        for folder in self._shared:
            folder.require()
        with explain_full_memory(LESS_MEMORY):
            self._run = self._create()

    def run(self, task: Task) -> None:
        """Run one task."""
        with explain_failed_compilation(), explain_full_memory(LESS_MEMORY):
            self._run(task)


def run_on_actors(
    tasks: Sequence[Task],
    create: Callable[[], Callable[[Task], None]],
    workers: WorkersConfig,
    on_death: Callable[[str], None],
    folders: Iterable[str],
) -> Iterator[Task]:
    """Run every task on one of workers.num_workers actors, in order, and yield each task when it is done.

    create: picklable; called once in each actor, it returns the function that runs a task. on_death: called with a
    line of text when an actor has died. folders: paths or URIs that tasks write into. Needs a running Ray. An actor
    that Ray cannot schedule yet, or that has died, does not delay the others. An error of a task is raised unchanged.
    Raises WorkersDied if actors keep dying, and InvalidInput if a folder is another one where an actor runs.
    """
    shared = [storage.mark_folder(folder) for folder in folders]
    try:
        yield from _run_tasks(tasks, create, workers, on_death, shared)
    finally:
        for folder in shared:
            folder.remove_mark()


def _run_tasks(
    tasks: Sequence[Task],
    create: Callable[[], Callable[[Task], None]],
    workers: WorkersConfig,
    on_death: Callable[[str], None],
    shared: Sequence[storage.SharedFolder],
) -> Iterator[Task]:
    import ray

    lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
    actor: Any = ray.remote(PoolWorker).options(
        num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, **workers.placement
    )
    waiting, num_done = deque(range(len(tasks))), 0
    running: dict[Any, tuple[Any, int | None]] = {}
    """Pending result -> its actor, and the position of its task; None for the actor's start."""
    deaths: Counter[int | None] = Counter()

    def start_worker() -> None:
        worker = actor.remote(create, shared)
        running[worker.start.remote()] = worker, None

    for _ in range(min(workers.num_workers, len(tasks))):
        start_worker()
    while num_done < len(tasks):
        (result,), _ = ray.wait(list(running))
        worker, ended = running.pop(result)
        try:
            ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except lost as error:
            deaths[ended] += not getattr(error, "preempted", False)
            if deaths[ended] >= (MAX_DEATHS * workers.num_workers if ended is None else MAX_DEATHS):
                raise _workers_died(error, ended) from error
            on_death(f"a worker died ({first_line(error)}); its task is retried on another worker")
            if ended is not None:
                waiting.append(ended)
            if waiting:
                start_worker()
            continue
        if waiting:
            position = waiting.popleft()
            running[worker.run.remote(tasks[position])] = worker, position
        if ended is None:
            deaths[None] = 0
        else:
            num_done += 1
            yield tasks[ended]


def _workers_died(error: Exception, task: int | None) -> WorkersDied:
    when = "while they started" if task is None else "on the same task"
    return WorkersDied(
        f"workers died again and again {when} ({first_line(error).rstrip('.')})",
        "them to have the memory and the device that they need",
        "See Ray's logs on their node (/tmp/ray/session_latest/logs), then run the same command again: it resumes",
    )
