"""The ports on which Ray's processes on this machine accept connections from other machines."""

import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import psutil

PYTHON_OF_RAY = (
    "/ray/dashboard/",
    "/ray/_private/",
    "/ray/autoscaler/",
    "ray.util.client.server",
    "['ray', 'ray.",  # what the dashboard's forkserver loads
)
"""Parts of the commands of Ray's processes that run Python."""


class Listener(NamedTuple):
    """A TCP port on which a process accepts connections. process: its name, such as raylet."""

    process: str
    address: str
    port: int


def ray_listeners() -> list[Listener]:
    """Return the ports of Ray's processes that listen beyond loopback; other users' are seen by root only."""
    import psutil

    return sorted(set(_beyond_loopback(process for process in psutil.process_iter() if _is_of_ray(process))))


def listeners_below(process: "psutil.Process") -> list[Listener]:
    """Return the ports of a process and all that it has started, as `ray_listeners` does."""
    return sorted(set(_beyond_loopback([process, *process.children(recursive=True)])))


def _beyond_loopback(processes: Iterable["psutil.Process"]) -> Iterator[Listener]:
    import psutil

    for process in processes:
        try:
            connections, name = process.net_connections("tcp"), _name(process)
        except psutil.Error:  # it has ended, or is another user's
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip):
                yield Listener(name, connection.laddr.ip, connection.laddr.port)


def is_loopback(address: str) -> bool:
    """Return whether an IP address is one that only this machine reaches, such as 127.0.0.1 and ::ffff:127.0.0.1."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _is_of_ray(process: "psutil.Process") -> bool:
    """Whether a process is Ray's own, or a worker, which calls itself ray::NAME."""
    import psutil

    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    # The files and modules of Ray's own processes; the driver, which listens too, may be any program.
    return any(part.startswith(("ray::", "ray-")) or "/ray/core/src/ray/" in part for part in command[:1]) or any(
        name in part for part in command[1:5] for name in PYTHON_OF_RAY
    )


def _name(process: "psutil.Process") -> str:
    command = process.cmdline()
    if command and command[0].startswith("ray::"):
        return command[0]
    scripts = [Path(part).stem for part in command[1:3] if part.endswith(".py")]
    return scripts[0] if scripts else process.name()
