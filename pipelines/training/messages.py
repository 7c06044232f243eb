"""What the workers of a group tell the process that started them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """How training goes: means over all workers since the last report."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    step: int


@dataclass(frozen=True)
class Notice:
    """Something that people should read."""

    text: str


Message = Report | Saved | Notice


class Mailbox:
    """Messages on their way from a worker to the driver; a Ray actor."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages
