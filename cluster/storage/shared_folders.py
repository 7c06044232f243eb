"""Find out whether a folder of this machine is the same folder on the machines that write into it."""

import platform
import time
import uuid
from dataclasses import dataclass

from cluster.storage.files import exists, remove_file, write_atomically
from cluster.storage.paths import is_local, join
from raydit.errors import InvalidInput

MARK_PREFIX = ".shared-"
"""Hidden, because readers of images leave hidden files out."""
WAIT_SECONDS = 10.0
"""How long a network file system may take to show a new file on other machines."""


@dataclass(frozen=True)
class SharedFolder:
    """A folder with a file by which other machines recognise it."""

    path: str
    """Path or URI."""
    mark: str | None
    """Name of the file; None in an object store, which is the same for all machines."""

    def require(self) -> None:
        """Raise InvalidInput if the folder of this path is another one on this machine."""
        if self.mark is None:
            return
        end = time.monotonic() + WAIT_SECONDS
        while not exists(join(self.path, self.mark)):
            if time.monotonic() >= end:
                raise InvalidInput(
                    f"{self.path} on {platform.node()}: found another folder than on the machine that runs the command",
                    "the same folder on all machines",
                    "choose a URI (s3://BUCKET/...) or the path of a mount that all nodes share",
                )
            time.sleep(WAIT_SECONDS / 100)

    def remove_mark(self) -> None:
        """Remove the file, when no other machine will look for it any more."""
        if self.mark is not None:
            remove_file(join(self.path, self.mark))


def mark_folder(path: str) -> SharedFolder:
    """Write a file into a folder, which is made if necessary, by which other machines can recognise it.

    Each call chooses a new name, because file systems remember whether they have seen one.
    """
    if not is_local(path):
        return SharedFolder(path, None)
    mark = f"{MARK_PREFIX}{uuid.uuid4().hex}"
    write_atomically(join(path, mark), b"")
    return SharedFolder(path, mark)
