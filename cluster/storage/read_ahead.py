"""Read many files in order: one after another from a disk, and with several requests in flight from an object store."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, TypeVar

from cluster.storage.files import MAX_CONCURRENT_REQUESTS, open_file
from cluster.storage.paths import is_local

Item = TypeVar("Item")
Result = TypeVar("Result")


def open_in_order(paths: Sequence[str]) -> Iterator[BinaryIO]:
    """Yield files that are open for reading and seeking, in the given order; the caller closes each.

    Files of an object store are downloaded into memory, at most MAX_CONCURRENT_REQUESTS of them in advance.
    Raises NotFound when the turn of a missing file comes.
    """
    if all(map(is_local, paths)):
        yield from map(open_file, paths)
        return
    yield from map_ahead(open_file, paths)


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int = MAX_CONCURRENT_REQUESTS
) -> Iterator[Result]:
    """Yield function(item) in order. Threads call it for at most `num_ahead` items in advance."""
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= num_ahead:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also when the caller stops early
            for future in ahead:
                future.cancel()
