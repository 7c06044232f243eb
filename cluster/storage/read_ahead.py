"""Read many files in order: one after the other from a disk, with several requests in advance from an object store."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from cluster.storage.files import MAX_CONCURRENT_REQUESTS, open_file
from cluster.storage.paths import is_local


def open_in_order(paths: Sequence[str]) -> Iterator[BinaryIO]:
    """Yield files that are open for reading and seeking, in the given order; the caller closes each.

    Files of an object store are downloaded into memory, at most MAX_CONCURRENT_REQUESTS of them in advance.
    Raises NotFound when the turn of a missing file comes.
    """
    if all(map(is_local, paths)):
        yield from map(open_file, paths)
        return
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        ahead: deque[Future[BinaryIO]] = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(open_file, path))
                if len(ahead) >= MAX_CONCURRENT_REQUESTS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also when the caller stops early
            for future in ahead:
                future.cancel()
