"""Marks beside reports that are written and not yet logged: the next command logs what an interrupted one did not.

Records of shards cannot serve as marks: another size of shards, or a repeated evaluation, leaves some beside a report
that was logged.
"""

from hashlib import sha256

from cluster import storage
from evaluation.report import REPORT_FILE


def mark_unlogged(folder: str, report: bytes, digest: str = "") -> None:
    """Mark a report as not yet logged, before its file is written.

    folder: the report's. report: content of its file. digest: of what it is about, where the folder may hold reports
    of several, which then have a mark each.
    """
    storage.write_atomically(_mark(folder, digest), sha256(report).hexdigest().encode())


def is_unlogged(folder: str, digest: str = "") -> bool:
    """Return whether the report in a folder is marked. A mark that is of a report never written means nothing."""
    mark, file = _mark(folder, digest), storage.join(folder, REPORT_FILE)
    if not storage.exists(mark) or not storage.exists(file):
        return False
    return storage.read_bytes(mark) == sha256(storage.read_bytes(file)).hexdigest().encode()


def mark_logged(folder: str, digest: str = "") -> None:
    """Remove the mark of a report that has been logged."""
    if storage.exists(mark := _mark(folder, digest)):
        storage.remove_file(mark)


def _mark(folder: str, digest: str) -> str:
    return storage.join(folder, "-".join(["unlogged", digest[:12]] if digest else ["unlogged"]))
