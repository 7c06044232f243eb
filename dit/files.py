"""Writing weights to disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
    """Raise OSError (ENOSPC) where safetensors, whose errors carry no code, finds no room at `path`."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
