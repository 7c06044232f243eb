"""Messages from training workers to the driver, the process that started them, and the mailbox that carries them."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.console import first_line
from raydit.errors import WorkersDied

POLL_SECONDS = 0.5
LAST_SECONDS = 10.0
"""Seconds to wait for the mailbox at the end if it does not answer."""
START_ATTEMPTS = 3


@dataclass(frozen=True)
class Report:
    """Metrics of the training loop: means over all workers since the last report."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Validated:
    """The losses of held-out latents after a step."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """The checkpoint of a step is complete."""

    step: int
    interrupted: bool = False
    """Whether training stops here, between two regular checkpoints."""


@dataclass(frozen=True)
class Notice:
    """A line for the user to read."""

    text: str


@dataclass(frozen=True)
class InLoop:
    """Whether the workers are in the training loop, which they can leave between two steps."""

    active: bool


Message = Report | Validated | Saved | Notice | InLoop


class Mailbox:
    """A Ray actor that holds messages until the driver takes them, and the driver's request to stop."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stopping = False

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take_all(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages

    def stop(self) -> None:
        self._stopping = True

    def is_stopping(self) -> bool:
        return self._stopping


class MailboxQuestion:
    """Asks the mailbox whether training shall stop. Never waits for the answer: it is that to an earlier question."""

    def __init__(self, mailbox: Any):
        """mailbox: handle of a Mailbox actor."""
        self._mailbox = mailbox
        self._pending: Any = None
        self._answer = False

    def __call__(self) -> bool:
        import ray

        if self._pending is None:
            self._pending = self._mailbox.is_stopping.remote()
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready and not self._answer:
            try:
                self._answer = ray.get(self._pending)
            except ray.exceptions.RayError:
                return False  # the mailbox died: training continues, and the driver reports it at the end
            self._pending = None
        return self._answer


@contextmanager
def receive_messages(on_message: Callable[[Message], None], mailbox: Any = None) -> Iterator[Any]:
    """Start a Mailbox, yield its actor handle, and call `on_message` with its messages in a thread of this process.

    mailbox: handle of one that `start_mailbox` has started already, which is used instead.
    The actor runs on this process's node, so that losing another node loses no message. An error of `on_message` is
    logged at once and raised at the end, so that training and later messages are not held up. The end waits until
    all messages are processed, however long `on_message` takes. Raises WorkersDied there if the actor died.
    """
    import ray

    mailbox = mailbox or start_mailbox()
    ended = threading.Event()
    errors: list[Exception] = []

    def deliver() -> None:
        while True:
            last = ended.wait(POLL_SECONDS)
            try:
                messages = _take_messages(mailbox, ended)
            except ray.exceptions.RayError as error:
                errors.append(_mailbox_died(error))
                return
            for message in messages:
                try:
                    on_message(message)
                except Exception as error:
                    logging.getLogger(__name__).exception("a message of the training workers could not be processed")
                    errors.append(error)
            if last:
                return

    thread = threading.Thread(target=deliver, name="messages", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        ended.set()
        # First, because the thread would take the end of the mailbox for its death, and because a thread that waits
        # for Ray while Ray is shut down crashes the process.
        thread.join()
        ray.kill(mailbox)
    if errors:
        raise errors[0]


def _take_messages(mailbox: Any, ended: threading.Event) -> list[Message]:
    """Return the mailbox's messages; none if it does not answer. Raises RayError if it died.

    ended: from when on it is waited for LAST_SECONDS only.
    """
    import ray

    answer, deadline = mailbox.take_all.remote(), math.inf
    while not (ready := ray.wait([answer], timeout=POLL_SECONDS)[0]):
        if ended.is_set():
            deadline = min(deadline, time.monotonic() + LAST_SECONDS)
        if time.monotonic() > deadline:
            break
    return ray.get(answer) if ready else []


def start_mailbox() -> Any:
    """Start a Mailbox on this process's node, and return its actor handle once it answers.

    A process may die before its actor's first task, when its machine is short of memory or too busy; it holds no
    message then, and is started again. Raises WorkersDied if that does not help.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    attempts = 0
    while True:
        attempts += 1
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=this_node).remote()
        try:
            ray.get(mailbox.take_all.remote())
            return mailbox
        except ray.exceptions.RayActorError as error:
            if attempts == START_ATTEMPTS:
                raise WorkersDied(
                    f"the process that receives the workers' messages died {attempts} times while it started "
                    f"({first_line(error)})",
                    "",
                    "read Ray's logs on this machine (/tmp/ray/session_latest/logs), then run the same command again",
                ) from error


def _mailbox_died(error: Exception) -> WorkersDied:
    return WorkersDied(
        f"the process that receives the workers' messages died ({first_line(error)}): the workers have ended, but some "
        "of their reports did not reach tracking",
        "",
        "run the same command again: it logs the missing reports, which the checkpoints hold",
    )
