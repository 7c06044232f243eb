"""Files of object stores that are open for random access, and whose throttled reads are repeated."""

import os
from typing import cast

import pyarrow as pa
from pyarrow.fs import FileSystem

from cluster.storage.object_stores import retry_throttled


def open_retried(filesystem: FileSystem, path: str) -> pa.NativeFile:
    """Open a file of an object store for random access; reads that the store throttles are repeated.

    Several threads may use it at a time. Libraries that read it need no retries of their own: what they have read up
    to then is kept.
    """
    return pa.PythonFile(_RetriedFile(retry_throttled(lambda: filesystem.open_input_file(path))), mode="r")


class _RetriedFile:
    """What pa.PythonFile needs of a Python file, over a file of pyarrow."""

    def __init__(self, file: pa.NativeFile):
        self.file, self.position = file, 0

    @property
    def closed(self) -> bool:
        return self.file.closed

    def close(self) -> None:
        self.file.close()

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size()}[whence]
        self.position = base + offset
        return self.position

    def read(self, num_bytes: int = -1) -> bytes:
        start, left = self.position, max(0, self.file.size() - self.position)
        wanted = left if num_bytes < 0 else min(num_bytes, left)
        data = cast(bytes, retry_throttled(lambda: self.file.read_at(wanted, start))) if wanted else b""
        self.position = start + len(data)
        return data
