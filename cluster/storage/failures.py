"""Errors of disks and object stores, replaced by errors for users that name the path."""

import contextlib
import errno
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from raydit.errors import RayditError, StorageFailed
from raydit.printable import message_of

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextlib.contextmanager
def explain_failures(path: str, *, missing: bool = False) -> Iterator[None]:
    """Replace an OSError of the block with StorageFailed, which names `path` as the caller gave it.

    FileNotFoundError passes, because callers know what a missing file means; unless missing is set, for a block that
    creates files: some file systems, such as /proc, answer so when nothing can be created.
    """
    try:
        yield
    except RayditError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        reason = message_of(error)
        raise StorageFailed(
            f"{path}: {reason}", "", "check that it exists, and that you may read and write it; or use another path"
        ) from error


def refused_write(error: BaseException | None) -> OSError | None:
    """Return the system's error behind an error, if it is that of a disk that is read-only or of a missing permission.

    error: an OSError, or the StorageFailed that was raised because of it.
    """
    found = error.__cause__ if isinstance(error, StorageFailed) else error
    refusals = (errno.EROFS, errno.EACCES, errno.EPERM)
    return found if isinstance(found, OSError) and found.errno in refusals else None


def explains_failures(
    function: Callable[Concatenate[str, Parameters], Result],
) -> Callable[Concatenate[str, Parameters], Result]:
    """Let a function, whose first argument is a path or URI, raise StorageFailed instead of an OSError."""

    @functools.wraps(function)
    def explained(path: str, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with explain_failures(path):
            return function(path, *args, **kwargs)

    return explained
