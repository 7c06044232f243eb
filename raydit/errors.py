"""The errors that a user can cause and correct. Every other exception is a bug, and shows its traceback.

    RayditError
    ├── InvalidInput       a value, file or combination that raydit cannot use       also a ValueError
    ├── NotFound           a file, artifact, run or model that does not exist        also a FileNotFoundError
    ├── AlreadyExists      a file or folder that would be overwritten                also a FileExistsError
    ├── InUse              a folder that another process is working in               also an OSError
    └── Failed             the input is valid, but the work could not be done
        ├── Unreachable    a server that does not answer                             also a ConnectionError
        ├── StorageFailed  a disk or store that refuses access, or fails             also an OSError
        ├── StorageFull    a disk or quota that is full                              also an OSError
        ├── Diverged       a training whose loss is no longer finite                 also a FloatingPointError
        └── WorkersDied    worker processes that end repeatedly                      also a ChildProcessError

Each derives from the built-in exception of its kind too, so that Python callers can catch what they expect.
"""

import errno
from typing import ClassVar

DISK_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EACCES: "Give yourself permission, or choose another path",
    errno.EPERM: "Give yourself permission, or choose another path",
    errno.EROFS: "Choose a path that can be written",
}
"""What to do about the system's errors of disks that are full or protected, by their number."""


class RayditError(Exception):
    """An error for users: what was found, what was expected instead, and what to do about it.

    found: what is wrong, beginning with where: a field, a file, a flag. expected: what would be right; empty if `found`
    says so. do: one or more instructions, without the final full stop; empty if there is nothing to do.
    The message is "<found>, expected <expected>. <Do>".
    """

    exit_code: ClassVar[int] = 2
    """Exit code of a command that ends with this error: 2 for bad input, 1 for work that failed."""
    max_part: ClassVar[int] = 2000
    """Most characters of each part that the message shows; what was found can be the content of a file."""

    def __init__(self, found: str, expected: str, do: str):
        self.found, self.expected, self.do = found, expected, do
        parts = [self.problem, do[:1].upper() + do[1:]]
        super().__init__(". ".join(self._shorten(part) for part in parts if part))

    @property
    def problem(self) -> str:
        """What is wrong, without what to do about it."""
        return f"{self.found}, expected {self.expected}" if self.expected else self.found

    @classmethod
    def _shorten(cls, part: str) -> str:
        """Return a part without its middle if it is too long."""
        half = cls.max_part // 2
        return part if len(part) <= cls.max_part else f"{part[:half]} ... {part[-half:]}"

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Errors are pickled between Ray's processes; by default, pickle would call the class with the message alone.
        return type(self), (self.found, self.expected, self.do)


class InvalidInput(RayditError, ValueError):
    """A value, a file or a combination of settings that raydit cannot use."""


class NotFound(RayditError, FileNotFoundError):
    """A file, artifact, run or model that does not exist."""


class AlreadyExists(RayditError, FileExistsError):
    """A file or folder that would be overwritten."""


class InUse(RayditError, OSError):
    """A folder that another running process is working in."""


class Failed(RayditError):
    """The input is valid, but the work could not be done."""

    exit_code = 1


class Unreachable(Failed, ConnectionError):
    """A server, a cluster or a store that does not answer."""


class StorageFailed(Failed, OSError):
    """A disk or an object store that refuses access, or that fails."""


class StorageFull(Failed, OSError):
    """A disk or quota that has no room for a file."""


class Diverged(Failed, FloatingPointError):
    """A training whose loss or gradients are no longer finite."""


class WorkersDied(Failed, ChildProcessError):
    """Worker processes that end repeatedly, or whose end cannot be recovered from."""
