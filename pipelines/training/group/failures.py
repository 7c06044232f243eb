"""What to do when a group of workers has failed: restart it, or raise the error that explains the failure."""

from pipelines.console import first_line
from pipelines.stage import JobContext
from raydit.errors import RayditError, WorkersDied

MAX_RESTARTS = 3
"""Restarts of the group after workers died, without a new checkpoint in between, before the stage fails."""


class Restarts:
    """Decides whether a group that failed is restarted, and counts its restarts since the last checkpoint."""

    def __init__(self, context: JobContext, stage: str) -> None:
        self._context, self._stage, self._count = context, stage, 0

    def on_checkpoint(self) -> None:
        """Begin to count anew, because the group has made progress."""
        self._count = 0

    def restart_or_raise(self, failure: BaseException, error: Exception) -> None:
        """Announce a restart; raise `failure`, or WorkersDied, if restarting would not help.

        failure: that of a worker. error: Ray Train's, in which it arrived.
        """
        if not is_retryable(failure):
            raise failure from error
        if self._count == MAX_RESTARTS:
            raise died_repeatedly(self._stage, failure) from error
        self._count += 1
        happened = "died" if _is_of_ray(failure) else "failed"
        self._context.say(self._stage, f"a worker {happened} ({first_line(failure)}); restarting all workers")


def first_cause(error: Exception) -> BaseException:
    """Return the error that a worker raised on purpose, rather than those of workers that lost contact with it."""
    failures = [*getattr(error, "worker_failures", {}).values()]
    at_start = getattr(getattr(error, "controller_failure", None), "cause", None)
    if isinstance(at_start, RayditError):  # raised while the workers formed a group
        failures.append(at_start)
    return next(iter(sorted(failures, key=is_retryable)), error)


def is_retryable(failure: BaseException) -> bool:
    """Return whether a worker died or lost contact with one that did; other errors would recur in the next attempt."""
    return not isinstance(failure, RayditError | ValueError | OSError | ArithmeticError)


def _is_of_ray(failure: BaseException) -> bool:
    """Return whether Ray reports the death of a worker; any other error was raised by the worker's own code."""
    return type(failure).__module__.startswith("ray.")


def died_repeatedly(stage: str, failure: BaseException) -> BaseException:
    """Return the error to raise after the last restart: a dead worker's is for the user, any other is a bug's own."""
    if not _is_of_ray(failure):
        return failure
    return WorkersDied(
        f"{stage}: workers died {MAX_RESTARTS + 1} times without a new checkpoint in between, the last time because: "
        f"{first_line(failure)}",
        "workers that have the memory and the device that they need",
        "read Ray's logs on their node (/tmp/ray/session_latest/logs), then run the same command again to resume",
    )
