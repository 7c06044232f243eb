"""Errors that a user can cause and mend. Anything else that is raised is a bug, and shows its traceback.

    RayditError
    ├── InvalidInput       a value, file or combination that raydit does not take     also a ValueError
    ├── NotFound           something that is named and is not there                   also a FileNotFoundError
    ├── AlreadyExists      something that would be overwritten                        also a FileExistsError
    ├── InUse              something that another process holds                       also an OSError
    └── Failed             the input was right and the work could not be done
        ├── Unreachable    a server that does not answer                              also a ConnectionError
        ├── StorageFailed  a disk or store that refuses access, or fails              also an OSError
        ├── StorageFull    a disk or quota without room                               also an OSError
        ├── Diverged       a training whose numbers are no longer finite              also a FloatingPointError
        └── WorkersDied    processes that end again and again                         also a ChildProcessError

Each is also the built-in error of its kind, so that callers from Python can catch what they expect.
"""

from typing import ClassVar


class RayditError(Exception):
    """An error for users: what was found, what was expected instead, and what to do about it.

    found: what is there, beginning with where: a field, a file, a flag. expected: what would be right; may be empty
    where the first part says it. do: one or more instructions, without the final stop.
    """

    exit_code: ClassVar[int] = 2
    """Exit code of a command that ends with this error: 2 for bad input, 1 for work that failed."""

    def __init__(self, found: str, expected: str, do: str):
        self.found, self.expected, self.do = found, expected, do
        parts = [f"{found}, expected {expected}" if expected else found, do[:1].upper() + do[1:]]
        super().__init__(". ".join(part for part in parts if part))

    def __reduce__(self):
        # Errors travel between Ray's processes by pickle, which would call the class with the whole message.
        return type(self), (self.found, self.expected, self.do)


class InvalidInput(RayditError, ValueError):
    """A value, a file or a combination of settings that raydit does not take."""


class NotFound(RayditError, FileNotFoundError):
    """A file, artifact, run or model that is named and is not there."""


class AlreadyExists(RayditError, FileExistsError):
    """A file or folder that would be overwritten."""


class InUse(RayditError, OSError):
    """A folder that another living process works in."""


class Failed(RayditError):
    """The input was right, and the work could not be done."""

    exit_code = 1


class Unreachable(Failed, ConnectionError):
    """A server, a cluster or a store that does not answer."""


class StorageFailed(Failed, OSError):
    """A disk or an object store that refuses access, or that fails."""


class StorageFull(Failed, OSError):
    """A disk or quota that has no room for what is to be written."""


class Diverged(Failed, FloatingPointError):
    """A training whose loss or gradients are no longer finite."""


class WorkersDied(Failed, ChildProcessError):
    """Worker processes that end again and again, or that took something with them."""
