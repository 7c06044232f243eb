"""Many files in order: on disk one after the other, from an object store several requests ahead of the reader."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from cluster.storage.files import REQUESTS_AT_ONCE, opened
from cluster.storage.paths import is_local


def opened_in_order(paths: Sequence[str]) -> Iterator[BinaryIO]:
    """Files to read from and seek in, as storage.opened gives them; whoever takes one closes it.

    Of an object store the content of a few files is in memory, of those that come next.
    """
    if all(map(is_local, paths)):
        yield from map(opened, paths)
        return
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        ahead: deque[Future[BinaryIO]] = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(opened, path))
                if len(ahead) >= REQUESTS_AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # of a reader that stops early, too
            for future in ahead:
                future.cancel()
