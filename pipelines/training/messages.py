"""Messages from training workers to the driver, the process that started them, and the mailbox that carries them."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.console import first_line
from raydit.errors import WorkersDied

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Report:
    """Metrics of the training loop: means over all workers since the last report."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """The checkpoint of a step is complete."""

    step: int


@dataclass(frozen=True)
class Notice:
    """A line for the user to read."""

    text: str


Message = Report | Saved | Notice


class Mailbox:
    """A Ray actor that holds messages until the driver takes them."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take_all(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages


@contextmanager
def receive_messages(on_message: Callable[[Message], None]) -> Iterator[Any]:
    """Start a Mailbox, yield its actor handle, and call `on_message` with its messages in a thread of this process.

    The actor runs on this process's node, so that losing another node loses no message. An error of `on_message` is
    logged at once and raised at the end, so that training and later messages are not held up. Raises WorkersDied at
    the end if the actor died.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=this_node).remote()
    ended = threading.Event()
    errors: list[Exception] = []

    def deliver() -> None:
        while True:
            last = ended.wait(POLL_SECONDS)
            try:
                messages = ray.get(mailbox.take_all.remote())
            except ray.exceptions.RayActorError as error:
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
        thread.join(timeout=10)
        ray.kill(mailbox)
    if errors:
        raise errors[0]


def _mailbox_died(error: Exception) -> WorkersDied:
    return WorkersDied(
        f"the process that receives the workers' messages died ({first_line(error)}): the workers have ended, but some "
        "of their reports did not reach tracking",
        "",
        "run the same command again: it logs the missing reports, which the checkpoints hold",
    )
