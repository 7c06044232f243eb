"""The doctor's checks of this machine, a Ray cluster and storage, each printed on one line."""

import os
import secrets
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cluster import job_server, jobs, storage
from cluster.address import given_address
from cluster.credentials import default_token_file
from cluster.listeners import ray_listeners
from cluster.session import ray_session
from raydit.compilers import find_compiler
from raydit.errors import InvalidInput, RayditError
from raydit.printable import message_of
from raydit.versions import installed_version

MIN_PYTHON = (3, 11)
NO_COMPILER = "no C++ compiler, which compile = true in a recipe needs (`apt install g++`)"
MAX_PORTS = 4
"""Ports that a line names; a busy node has dozens."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    name: what was checked. found: what was found. do: what to do about it; empty if ok.
    """

    name: str
    ok: bool
    found: str
    do: str = ""


def check_python() -> Check:
    """Check the version of the Python that runs this process."""
    found = f"{sys.version.split()[0]} at {sys.executable}"
    minimum = ".".join(map(str, MIN_PYTHON))
    return _check("python", sys.version_info >= MIN_PYTHON, found, f"install Python {minimum} or newer")


def check_packages(names: Sequence[str]) -> list[Check]:
    """Check for each distribution whether it is installed, and in which version, without importing it."""
    return [_check_package(name) for name in names]


def _check_package(name: str) -> Check:
    version = installed_version(name)
    return _check(name, version is not None, version or "not installed", f"pip install {name}")


def check_devices() -> Check:
    """Report CPU cores and CUDA devices; a machine without CUDA passes, because it is slow but works."""
    cores = f"{os.cpu_count()} CPU cores"
    try:
        import torch
    except ImportError as error:
        return Check("devices", False, f"{cores}, torch cannot be imported ({error})", "pip install torch")
    try:
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # torch has several kinds for a driver that it cannot use
        found = f"{cores}, torch cannot use the GPU ({message_of(error)})"
        return Check("devices", False, found, "update the driver, or install a torch for it")
    cuda = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
    return Check("devices", True, ", ".join([cores, *(cuda or ["no CUDA device"])]))


def check_compiler() -> Check:
    """Report the C++ compiler; a machine without one passes, because only recipes with compile = true need it."""
    return Check("compiler", True, find_compiler(gpu=False) or NO_COMPILER)


def check_ray(address: str | None = None) -> Check:
    """Check a Ray cluster: ask the job server at http://..., join any other address, or start Ray here if None."""
    try:
        found = _ask_job_server(address) if address and "://" in address else _ask_ray(address)
    except RayditError as error:
        return Check("ray", False, error.problem, error.do)
    except Exception as error:  # a failed start of Ray raises a bare Exception
        return Check("ray", False, message_of(error), "see /tmp/ray/session_latest/logs")
    return Check("ray", True, found)


def _ask_job_server(address: str) -> str:
    jobs.list_jobs(address)  # raises for another Ray version
    return f"Ray {job_server.server_version(address)} accepts jobs at {address}"


def _ask_ray(address: str | None) -> str:
    import ray

    with ray_session(address):
        resources = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
    given, _ = given_address(address)
    where = "started here" if given == "local" else given
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    found = f"Ray {ray.__version__}, {where}: {cpus:g} CPU, {gpus:g} GPU on {nodes} node(s)"
    if gpus and given == "local" and not _torch_finds_gpus():
        do = "install a torch with CUDA or ROCm that fits the driver, or set gpus_per_worker = 0 in recipes"
        raise InvalidInput(f"{found}, and torch {installed_version('torch')} finds no GPU", "one that both can use", do)
    return found


def _torch_finds_gpus() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.device_count() > 0


def check_token(address: str) -> Check:
    """Check that a job server refuses jobs without a token: otherwise everyone who can reach it can run code there."""
    try:
        is_open = job_server.accepts_jobs_without_token(address)
    except OSError as error:
        return Check("token", False, message_of(error), "correct --address")
    if not is_open:
        return Check("token", True, "jobs without a token are refused")
    do = "restart it with RAY_AUTH_MODE=token, and keep its ports behind a firewall (cluster/README.md)"
    return Check("token", False, f"{address} runs code for everyone who can reach it (CVE-2023-48022)", do)


def check_token_file() -> Check:
    """Check that no other user of this machine can read Ray's token, which lets them run code as this user."""
    file = default_token_file()
    if not file.exists():
        return Check("auth", True, "no token yet; the first Ray started here creates it")
    mode = stat.S_IMODE(file.stat().st_mode)
    found = f"{file} has mode {mode:04o}"
    return _check("auth", not mode & 0o077, found, f"chmod 600 {file}")


def check_ports() -> Check:
    """Report the ports on which Ray accepts connections from other machines; a firewall cannot be seen from here.

    A Ray that raydit starts has no such ports. The head and the nodes of a cluster need them.
    """
    found = [f"{process} {_host_port(address, port)}" for process, address, port in ray_listeners()]
    if not found:
        return Check("ports", True, "no Ray of this machine listens beyond it")
    more = f" and {len(found) - MAX_PORTS} more" if len(found) > MAX_PORTS else ""
    what = "needs a firewall (cluster/README.md): Ray listens beyond this machine,"
    return Check("ports", True, f"{what} {', '.join(found[:MAX_PORTS])}{more}")


def check_head_clock(address: str, max_seconds: float) -> Check:
    """Check that the clock of a job server differs from ours by at most `max_seconds`."""
    try:
        skew = job_server.clock_skew_seconds(address)
    except (OSError, TypeError, ValueError) as error:
        return Check("clock", False, message_of(error), "correct --address")
    found = f"the head's clock differs from ours by {skew:.0f} s"
    return _check("clock", skew <= max_seconds, found, "synchronize both by NTP")


def check_storage(path: str) -> Check:
    """Check a folder for outputs: write, replace and read a small file, and remove it again."""
    probe = probe_folder(path)
    file = storage.join(probe, "probe")
    try:
        storage.write_atomically(file, b"old")
        storage.write_atomically(file, b"new")
        replaced = storage.read_bytes(file) == b"new"
        storage.remove_folder(probe)
    except (OSError, ValueError) as error:
        return Check("storage", False, f"{path}: {message_of(error)}", "choose a path or URI that is writable")
    free = storage.free_bytes(path)
    found = f"{path} is writable" + (f", {free / 2**30:.1f} GiB free" if free is not None else "")
    return _check("storage", replaced, found, "a replaced file still reads as the old one; choose another path")


def probe_folder(path: str) -> str:
    """Return a new temporary folder for a test of an output, which need not exist yet."""
    folder = storage.nearest_folder(path) if storage.is_local(path) else path
    return storage.join(folder, f"{storage.TEMPORARY_PREFIX}doctor-{secrets.token_hex(4)}")


def render(checks: Sequence[Check], width: int = 0) -> str:
    """Format each check as one aligned line, with what to do after an arrow.

    width: minimum width of the column of names, for checks that are printed one at a time.
    """
    width = max((width, *(len(check.name) for check in checks)))
    return "\n".join(
        f"{'ok' if check.ok else '!!'} {check.name:<{width}}  {check.found}" + (f" -> {check.do}" if check.do else "")
        for check in checks
    )


def _check(name: str, ok: bool, found: str, do: str) -> Check:
    return Check(name, ok, found, "" if ok else do)


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
