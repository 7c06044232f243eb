"""Tasks shared out among Ray actors, any of which may die: what it had in hand, another does.

Ray Data could share them out as well. It keeps three actors and a polling thread awake beside the workers, and there
is nothing here for its blocks to carry: a task is a few names, its outcome a file.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.config.training import WorkersConfig
from pipelines.console import first_line

Task = TypeVar("Task")
DEATHS = 3
"""Workers that may die of one task, or in a row (times the size of the pool) before any has started."""


class PoolWorker:
    """What does tasks, made in the actor's own process."""

    def __init__(self, make: Callable[..., Callable[[Any], None]], arguments: tuple):
        self._make = lambda: make(*arguments)

    def start(self) -> None:
        """Not in __init__, whose errors reach others as text."""
        self._run = self._make()

    def run(self, task: Any) -> None:
        self._run(task)


def run_on_actors(
    tasks: Sequence[Task],
    make: Callable[..., Callable[[Any], None]],
    arguments: tuple,
    workers: WorkersConfig,
    tell: Callable[[str], None],
) -> Iterator[Task]:
    """Have `make(*arguments)` called with every task by some worker, in their order; yields each task that is done.

    A worker that has no place in the cluster yet, or has died, holds up no other. Needs a Ray that is started. tell:
    hears of workers that died. Raises what workers raise, and ChildProcessError if they die again and again.
    """
    import ray

    lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
    create: Any = ray.remote(PoolWorker).options(
        num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, **workers.placement
    )
    waiting, done = deque(range(len(tasks))), 0
    at_work: dict[Any, tuple[Any, int | None]] = {}
    """Of every answer that is expected: whose it is, and to which task; None: to its start."""
    deaths: Counter[int | None] = Counter()

    def start() -> None:
        worker = create.remote(make, arguments)
        at_work[worker.start.remote()] = worker, None

    for _ in range(min(workers.num_workers, len(tasks))):
        start()
    while done < len(tasks):
        (answer,), _ = ray.wait(list(at_work))
        worker, ended = at_work.pop(answer)
        try:
            ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except lost as error:
            deaths[ended] += not getattr(error, "preempted", False)
            if deaths[ended] >= (DEATHS * workers.num_workers if ended is None else DEATHS):
                raise _died(error, ended) from error
            tell(f"a worker died ({first_line(error)}); another does what it had in hand")
            if ended is not None:
                waiting.append(ended)
            if waiting:
                start()
            continue
        if waiting:
            number = waiting.popleft()
            at_work[worker.run.remote(tasks[number])] = worker, number
        if ended is None:
            deaths[None] = 0
        else:
            done += 1
            yield tasks[ended]


def _died(error: Exception, task: int | None) -> ChildProcessError:
    when = "at their start" if task is None else "at the same work"
    return ChildProcessError(
        f"workers died again and again {when}: {first_line(error)} Expected them to have the memory and the device "
        "that they need; Ray's logs on their node say more (/tmp/ray/session_latest/logs), and the same command goes on"
    )
