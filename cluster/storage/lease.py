"""One owner for an output folder: who comes second is told who is there, or takes over from an owner that is dead.

The lease is a small file in the folder. On disk it is made by a hard link, which exactly one of several can make,
also on NFS. An object store has no such thing in pyarrow: there the last to write wins, and everyone looks again a
moment after writing, when whoever saw no lease before has written, too (Fischer's algorithm: Lamport 1987, "A fast
mutual exclusion algorithm"). One whose request took longer than that moment is told by the next sign of life.
"""

import contextlib
import errno
import getpass
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.jobs import current_job_id
from cluster.storage.files import read_bytes, write_atomically
from cluster.storage.folders import remove_stale_temporaries
from cluster.storage.paths import is_local, join, local_path, nearest_folder
from cluster.storage.temporaries import alone_in, is_running, temporary_in

FILE = ".lease.json"
EXPIRES_SECONDS = 90.0
"""How long an owner on another machine counts as alive after its last sign of life."""
HEARTBEAT_SECONDS = 15.0
PATIENCE_SECONDS = 2.0
"""How long to wait for the folder before refusing: one that only found everything finished is gone by then."""

SETTLE_SECONDS = 3.0
"""How long after writing a lease in an object store to look whether it is still ours: longer than a slow request."""


class InUse(OSError):
    """The folder belongs to another process that is alive."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a folder. Times are seconds since 1970."""

    id: str
    user: str
    host: str
    process: int
    process_started: str
    """Tells the process from a later one of the same number; empty where the system does not say."""
    machine: str
    """Equal where process numbers mean the same processes: this boot, this container."""
    job: str | None
    since: float
    expires: float
    """0 for one that has ended and left its record behind, as in an object store."""

    @classmethod
    def here(cls) -> "Owner":
        now, process = time.time(), os.getpid()
        return cls(
            id=secrets.token_hex(8),
            user=_user(),
            host=platform.node(),
            process=process,
            process_started=_process_started(process) or "",
            machine=_machine(),
            job=current_job_id(),
            since=now,
            expires=now + EXPIRES_SECONDS,
        )

    @property
    def is_this_process(self) -> bool:
        mine = (_machine(), os.getpid(), _process_started(os.getpid()) or "")
        return (self.machine, self.process, self.process_started) == mine

    @property
    def is_dead(self) -> bool:
        """On this machine: whether the process is gone. On another: whether its time is up."""
        if not self.machine or self.machine != _machine():
            return time.time() > self.expires
        started = _process_started(self.process)
        return not is_running(self.process) if started is None else started != self.process_started

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.user}, process {self.process} on {self.host}{job}, since {_clock(self.since)}"


NOBODY = Owner(id="", user="", host="", process=0, process_started="", machine="", job=None, since=0.0, expires=0.0)


@contextlib.contextmanager
def lease(
    folder: str, *, lost: Callable[[str], object], patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[Owner | None]:
    """Hold a folder for as long as the block runs; yields the dead owner from whom it was taken over, if any.

    folder: path or URI; made if it is not there, and removed again if nothing was put in. A process may hold a
    folder several times. lost: called from another thread if somebody took the folder over from us, which can
    happen only to a process that could not give a sign of life for 90 seconds.
    Raises InUse if another living process holds it.
    """
    path, owner = join(folder, FILE), Owner.here()
    existing = nearest_folder(folder) if is_local(folder) else None
    earlier = _acquire(path, owner, patience_seconds)
    if earlier and earlier.is_this_process:
        yield None
        return
    remove_stale_temporaries(folder)
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(path, owner, ended, lost), name="lease", daemon=True)
    thread.start()
    try:
        yield earlier
    finally:
        ended.set()
        thread.join()
        _release(path, owner)
        if existing:
            _remove_empty(local_path(folder), existing)


def _acquire(path: str, owner: Owner, patience_seconds: float) -> Owner | None:
    """Become the owner; returns the dead one before, or this process if it is the owner already."""
    deadline, dead = time.monotonic() + patience_seconds, None
    while True:
        found = _read(path)
        if found and found.is_this_process:
            return found
        if found is None or found.is_dead:
            dead = found or dead
            if _replace(path, found, owner):
                return dead
        elif time.monotonic() > deadline:
            raise InUse(_refusal(path, found))
        else:
            time.sleep(0.1)


def _replace(path: str, dead: Owner | None, owner: Owner) -> bool:
    """Put our lease where none is, or that of a dead owner; whether it is ours now."""
    content = _content(owner, expires=owner.expires)
    if is_local(path):
        folder = os.path.dirname(local_path(path))
        os.makedirs(folder, exist_ok=True)
        with alone_in(folder), temporary_in(folder, len(content)) as temporary:
            if dead:
                _remove(path, dead)
            Path(temporary).write_bytes(content)
            _link(temporary, local_path(path))
    else:
        write_atomically(path, content)
        time.sleep(SETTLE_SECONDS)
    found = _read(path)
    return found is not None and found.id == owner.id


def _link(temporary: str, target: str) -> None:
    try:
        os.link(temporary, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(temporary, target)  # no hard links here: the last one wins, as in an object store


def _remove(path: str, dead: Owner) -> None:
    """Remove the lease of a dead owner; if somebody was faster and it is a new one, put it back."""
    target = local_path(path)
    with temporary_in(os.path.dirname(target), 0) as aside:
        try:
            os.rename(target, aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if found is not None and found.id != dead.id:
            _link(aside, target)


def _keep(path: str, owner: Owner, ended: threading.Event, lost: Callable[[str], object]) -> None:
    """Give a sign of life now and then. A disk that is full or away for a while does not end the work."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            found = _read(path)
            if found is not None and found.id != owner.id:
                lost(f"the folder was taken over by {found}")
                return
            write_atomically(path, _content(owner, expires=time.time() + EXPIRES_SECONDS))


def _release(path: str, owner: Owner) -> None:
    with contextlib.suppress(OSError):  # the folder may be gone, or its disk; the lease then dies with us
        found = _read(path)
        if found is None or found.id != owner.id:
            return
        if is_local(path):
            os.remove(local_path(path))
        else:
            write_atomically(path, _content(owner, expires=0.0))


def _remove_empty(folder: str, existing: str) -> None:
    with contextlib.suppress(OSError):  # not empty: then it stays
        while folder != existing:
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def _read(path: str) -> Owner | None:
    """The owner, or None. What cannot be read was torn by a crash of the machine: nobody alive wrote it."""
    try:
        return Owner(**json.loads(read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return NOBODY


def _content(owner: Owner, *, expires: float) -> bytes:
    return json.dumps(asdict(owner) | {"expires": expires}).encode()


def _refusal(path: str, owner: Owner) -> str:
    folder = os.path.dirname(local_path(path)) if is_local(path) else path.replace(f"/{FILE}", "")
    end = f"raydit jobs stop {owner.job}" if owner.job else f"kill -INT {owner.process} on {owner.host}"
    return (
        f"{folder} is in use by {owner}; expected nobody, because two at once would overwrite each other. Wait until "
        f"it has ended, end it ({end}), or set output to another folder; if its machine is gone, the folder is free "
        f"at {_clock(owner.expires)}"
    )


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return f"user {os.getuid()}"


def _machine() -> str:
    """What is equal for two processes that can see each other's numbers; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(process: int) -> str | None:
    """When a process started, in ticks since boot; None where the system does not say, or there is none.

    One that is dead and not yet buried by its parent still has a number: of it, "ended".
    """
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if state in "ZX" else fields[18]
