"""Give an output folder one owner at a time: a second process is refused, unless the owner is dead.

The lease is a small file in the folder. On a disk it is created by a hard link, which exactly one of several processes
can create, also on NFS. pyarrow has nothing like it for object stores: there the last writer wins, and every process
reads the lease again some seconds after it has written its own, when each process that saw no lease before has written,
too (Fischer's algorithm: Lamport 1987, "A fast mutual exclusion algorithm"). A process whose request took longer than
that learns of the other owner at its next heartbeat.
"""

import contextlib
import errno
import getpass
import json
import os
import platform
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from cluster.jobs import current_job_id
from cluster.storage.failures import explain_failures
from cluster.storage.files import read_bytes, write_atomically
from cluster.storage.folders import remove_stale_temporaries
from cluster.storage.paths import is_local, join, local_path, nearest_folder, refuse_file_on_the_way, refuse_job_folder
from cluster.storage.temporaries import lock, raise_storage_full, temporary_path
from cluster.threads import run_beside
from raydit.errors import InUse

LEASE_FILE = ".lease.json"
EXPIRY_SECONDS = 90.0
"""Time after its last heartbeat at which an owner on another machine counts as dead."""
HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 30.0
"""Time for which an expired lease must stay as it is before it is taken over: its owner's clock may be behind ours."""
WAIT_SECONDS = 2.0
"""Time to wait for a folder before it is refused: a process that only finds everything finished is gone by then."""

SETTLE_SECONDS = 3.0
"""Time between writing a lease to an object store and reading it again; longer than a slow request takes."""
MAX_LEASE_BYTES = 2**16
MAX_TEXT_LENGTH = 4096
END_OF_TIME = 253_402_300_800.0
"""The year 10000 in seconds since 1970, up to which times can be shown."""
MAX_CLOCK_DIFFERENCE = 3600.0
"""Seconds by which the clocks of two machines may differ before a lease's end is reported as wrong."""


@dataclass(frozen=True, kw_only=True)
class LeaseOwner:
    """The process that holds a folder, as the lease file records it. Times are seconds since 1970."""

    id: str
    user: str
    host: str
    process: int
    process_started: str
    """Start time, which distinguishes the process from a later one with the same id; empty if it is unknown."""
    machine: str
    """Equal for two processes that see each other's process ids: the same boot, the same container."""
    job: str | None
    since: float
    expires: float
    """0 for a lease that its owner has released, perhaps without ending; in an object store its record stays."""

    @classmethod
    def this_process(cls) -> "LeaseOwner":
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
            expires=now + EXPIRY_SECONDS,
        )

    @classmethod
    def from_json(cls, data: bytes) -> "LeaseOwner":
        """Return the owner that a lease file records. Raises ValueError or TypeError for what raydit never writes."""
        owner = cls(**json.loads(data))
        texts = (owner.id, owner.user, owner.host, owner.process_started, owner.machine, owner.job or "")
        if not all(isinstance(text, str) and len(text) <= MAX_TEXT_LENGTH for text in texts):
            raise ValueError("a field is not text, or is too long")
        if type(owner.process) is not int or not 0 <= owner.process < 2**31:
            raise ValueError("the process is not a process id")
        times = (owner.since, owner.expires)  # not-a-number is in no range
        if not all(type(seconds) in (int, float) and 0 <= seconds < END_OF_TIME for seconds in times):
            raise ValueError("since or expires is not a time")
        return owner

    @property
    def is_this_process(self) -> bool:
        """Whether this process holds the folder by this lease, and has not released it."""
        mine = (_machine(), os.getpid(), _process_started(os.getpid()) or "")
        return self.expires > 0 and (self.machine, self.process, self.process_started) == mine

    @property
    def is_elsewhere(self) -> bool:
        """Whether the owner is on another machine, whose processes we do not see."""
        return not self.machine or self.machine != _machine()

    @property
    def has_expired(self) -> bool:
        """Whether an owner on another machine has extended the lease too long ago, by our clock."""
        return self.is_elsewhere and time.time() > self.expires

    @property
    def is_dead(self) -> bool:
        """Whether the lease was released, or its owner on this machine has ended."""
        if self.expires == 0:
            return True
        if self.is_elsewhere:
            return False
        started = _process_started(self.process)
        return not psutil.pid_exists(self.process) if started is None else started != self.process_started

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.user}, process {self.process} on {self.host}{job}, since {_format_time(self.since)}"


UNKNOWN_OWNER = LeaseOwner(
    id="", user="", host="", process=0, process_started="", machine="", job=None, since=0.0, expires=0.0
)
"""The owner of a lease file that cannot be read; it counts as dead."""


@contextlib.contextmanager
def hold_folder(
    folder: str, *, on_lost: Callable[[str], object], wait_seconds: float = WAIT_SECONDS, field: str = "output"
) -> Iterator[LeaseOwner | None]:
    """Hold a folder for the duration of the block; provides the dead owner that held it before, or None.

    folder: path or URI. It is created if it does not exist, and removed again if it is still empty at the end. A
    process may hold a folder several times. on_lost: called from another thread with a message if another process takes
    the folder over, which happens only to a process that could not write a heartbeat for 90 seconds. wait_seconds: how
    long to wait for a living owner; the lease of one on another machine that has expired is watched for 30 seconds.
    field: the recipe's field that names the folder, for the message.
    Raises InUse if another living process holds the folder, InvalidInput if a file is there or the folder is deleted
    with the job, and StorageFailed if it cannot be written.
    """
    path, owner = join(folder, LEASE_FILE), LeaseOwner.this_process()
    refuse_file_on_the_way(folder)
    refuse_job_folder(folder)
    existing = nearest_folder(folder) if is_local(folder) else None
    with explain_failures(folder, missing=True):
        earlier = _acquire(path, owner, wait_seconds, field)
    if earlier and earlier.is_this_process:
        yield None
        return
    remove_stale_temporaries(folder)
    try:
        with run_beside("lease", _send_heartbeats, path, owner, on_lost):
            yield earlier
    finally:
        _release(path, owner)
        if existing:
            _remove_empty_folders(local_path(folder), existing)


def _acquire(path: str, owner: LeaseOwner, wait_seconds: float, field: str = "output") -> LeaseOwner | None:
    """Become the owner; return the dead owner before, or the present lease if this process holds the folder already."""
    deadline, dead, silent = time.monotonic() + wait_seconds, None, None
    while True:
        found = _read(path)
        if found and found.is_this_process:
            return found
        if found is None or found.is_dead or found == silent:
            dead = found or dead
            if _replace(path, found, owner):
                return dead
        elif found.has_expired and _stays(path, found):
            silent = found
        elif time.monotonic() > deadline:
            raise _in_use(path, found, field)
        else:
            time.sleep(0.1)


def _stays(path: str, found: LeaseOwner) -> bool:
    """Return whether a lease stays as it was found for the time of two heartbeats. Returns as soon as it differs."""
    end = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE_SECONDS))
        if _read(path) != found:
            return False
    return True


def _replace(path: str, dead: LeaseOwner | None, owner: LeaseOwner) -> bool:
    """Write our lease where there is none, or instead of a dead owner's; return whether it is ours afterwards."""
    content = _encode(owner, expires=owner.expires)
    if is_local(path):
        folder = os.path.dirname(local_path(path))
        with raise_storage_full(folder, len(content)):
            os.makedirs(folder, exist_ok=True)
        with lock(folder), temporary_path(folder, len(content)) as temporary:
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
        os.rename(temporary, target)  # no hard links on this disk: the last writer wins, as in an object store


def _remove(path: str, dead: LeaseOwner) -> None:
    """Remove a dead owner's lease; put it back if another process has replaced it in the meantime."""
    target = local_path(path)
    with temporary_path(os.path.dirname(target), 0) as renamed:
        try:
            os.rename(target, renamed)
        except FileNotFoundError:
            return
        found = _read(renamed)
        if found is not None and found.id != dead.id:
            _link(renamed, target)


def _send_heartbeats(path: str, owner: LeaseOwner, on_lost: Callable[[str], object], ended: threading.Event) -> None:
    """Extend the lease every few seconds. A disk that is full or unreachable for a while does not stop the work."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            found = _read(path)
            if found is not None and found.id != owner.id:
                on_lost(f"the folder was taken over by {found}")
                return
            write_atomically(path, _encode(owner, expires=time.time() + EXPIRY_SECONDS))


def _release(path: str, owner: LeaseOwner) -> None:
    with contextlib.suppress(OSError):  # the folder or its disk may be gone; the lease then ends with this process
        found = _read(path)
        if found is None or found.id != owner.id:
            return
        if is_local(path):
            os.remove(local_path(path))
        else:
            write_atomically(path, _encode(owner, expires=0.0))


def _remove_empty_folders(folder: str, existing: str) -> None:
    with contextlib.suppress(OSError):  # a folder that is not empty stays
        while folder != existing:
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def _read(path: str) -> LeaseOwner | None:
    """Return the owner, or None if there is no lease.

    A file that cannot be parsed, or that is no lease that raydit writes, was truncated by a crash of its machine, so no
    living process holds the folder.
    """
    try:
        return LeaseOwner.from_json(read_bytes(path, max_bytes=MAX_LEASE_BYTES))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        return UNKNOWN_OWNER


def _encode(owner: LeaseOwner, *, expires: float) -> bytes:
    return json.dumps(asdict(owner) | {"expires": expires}).encode()


def _in_use(path: str, owner: LeaseOwner, field: str) -> InUse:
    folder = os.path.dirname(local_path(path)) if is_local(path) else path.replace(f"/{LEASE_FILE}", "")
    stop = (
        f"raydit jobs stop {shlex.quote(owner.job)}" if owner.job else f"kill -INT {int(owner.process)} on {owner.host}"
    )
    gone = f"the folder is free from {_format_time(owner.expires)} on"
    if owner.expires > time.time() + EXPIRY_SECONDS + MAX_CLOCK_DIFFERENCE:
        gone = f"remove {path}, which lasts until {_format_time(owner.expires)} because of a wrong clock"
    elif owner.has_expired:
        gone = "run the same command again: its lease is still extended, by a clock that is behind"
    return InUse(
        f"{folder} is in use by {owner}",
        "no other process, because two would overwrite each other's files",
        f"wait until it ends, stop it ({stop}), or set {field} to another folder; if its machine is gone, {gone}",
    )


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return f"user {os.getuid()}"


def _machine() -> str:
    """Return a string that is equal for two processes that see each other's process ids; empty if it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(process: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if it is unknown or there is no such process.

    Not psutil's, because lease files record this one. "ended" stands for a process that has ended and still has its id
    because its parent has not waited for it.
    """
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if state in "ZX" else fields[18]
