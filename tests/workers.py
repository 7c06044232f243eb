"""The processes of one test session (pytest-xdist's workers): what the first of them starts, the others use too."""

import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Workers:
    """folder: the same for all workers of the session. is_first: of this worker; True without pytest-xdist."""

    folder: Path
    is_first: bool

    def publish(self, name: str, text: str) -> None:
        """Write a file in the folder, for the workers that wait for it."""
        temporary = self.folder / f".{name}"
        temporary.write_text(text)
        temporary.rename(self.folder / name)

    def wait_for(self, name: str, seconds: float) -> str:
        """Return the content of a file that another worker publishes."""
        deadline = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"the first worker has not published {name} within {seconds} s"
            time.sleep(0.2)
        return (self.folder / name).read_text()

    def wait_until_others_have_ended(self) -> None:
        with open(self.folder / "in_use", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


@pytest.fixture(scope="session")
def workers(tmp_path_factory, worker_id) -> Iterator[Workers]:
    """The workers of this session. Workers after the first are counted as running until this fixture ends."""
    base = tmp_path_factory.getbasetemp()  # of this worker; its parent is the session's
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    is_first = worker_id in ("master", "gw0")
    with open(folder / "in_use", "w") as file:
        if not is_first:
            fcntl.flock(file, fcntl.LOCK_SH)
        yield Workers(folder, is_first)
