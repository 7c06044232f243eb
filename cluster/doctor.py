"""Is this machine, this cluster, this storage fit to run raydit? One check and one line each."""

import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from cluster import jobs, storage
from cluster.session import ray_session
from cluster.storage.temporaries import TEMPORARY_PREFIX

OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """name: what was looked at. found: what is there. do: what to do about it, empty when ok."""

    name: str
    ok: bool
    found: str
    do: str = ""


def check_python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return _check("python", sys.version_info >= OLDEST_PYTHON, found, f"install Python {oldest} or newer")


def check_packages(names: Sequence[str]) -> list[Check]:
    """One check per distribution: is it installed, and which version. Nothing is imported."""
    return [_check_package(name) for name in names]


def _check_package(name: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}")


def check_devices() -> Check:
    """CPU cores and CUDA devices; a machine without CUDA is slow, not broken."""
    cores = f"{os.cpu_count()} CPU cores"
    try:
        import torch
    except ImportError as error:
        return Check("devices", False, f"{cores}, torch cannot be imported ({error})", "pip install torch")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    cuda = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
    return Check("devices", True, ", ".join([cores, *(cuda or ["no CUDA device"])]))


def check_ray(address: str | None = None) -> Check:
    """Reach the Ray of this address: http://... asks its job server, any other is joined, None starts one."""
    try:
        found = _ask_job_server(address) if address and "://" in address else _ask_ray(address)
    except Exception as error:  # Ray that cannot start raises a bare one
        do = "correct --address, or leave it out for a local Ray" if address else "see /tmp/ray/session_latest/logs"
        return Check("ray", False, _one_line(error), do)
    return Check("ray", True, found)


def _ask_job_server(address: str) -> str:
    jobs.list_jobs(address)  # refuses another Ray version
    return f"Ray {jobs.check_server(address)} takes jobs at {address}"


def _ask_ray(address: str | None) -> str:
    import ray

    with ray_session(address):
        resources = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
    where = address or os.environ.get("RAY_ADDRESS") or "started here"
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return f"Ray {ray.__version__}, {where}: {cpus:g} CPU, {gpus:g} GPU on {nodes} node(s)"


def check_token(address: str) -> Check:
    """Whether a job server refuses jobs without a token: with none, whoever reaches it runs code there."""
    try:
        is_open = jobs.is_open(address)
    except OSError as error:
        return Check("token", False, _one_line(error), "correct --address")
    if not is_open:
        return Check("token", True, "jobs without a token are refused")
    do = "stop it and start it with RAY_AUTH_MODE=token; keep its ports behind a firewall (cluster/README.md)"
    return Check("token", False, f"{address} runs the code of anybody who reaches it (CVE-2023-48022)", do)


def check_head_clock(address: str, most_seconds: float) -> Check:
    """Whether the clock of a job server agrees with ours."""
    try:
        skew = jobs.clock_skew_seconds(address)
    except (OSError, TypeError, ValueError) as error:
        return Check("clock", False, _one_line(error), "correct --address")
    found = f"the head's clock is {skew:.0f} s off ours"
    return _check("clock", skew <= most_seconds, found, "let both keep time by NTP")


def check_storage(path: str) -> Check:
    """Write, replace and read a small file where artifacts shall go, and remove it again."""
    folder = storage.nearest_folder(path) if storage.is_local(path) else path
    probe = storage.join(folder, f"{TEMPORARY_PREFIX}doctor-{secrets.token_hex(4)}")
    file = storage.join(probe, "probe")
    try:
        storage.write_atomically(file, b"old")
        storage.write_atomically(file, b"new")
        whole = storage.read_bytes(file) == b"new"
        storage.remove_folder(probe)
    except (OSError, ValueError) as error:
        return Check("storage", False, f"{path}: {_one_line(error)}", "choose a path or URI that can be written")
    free = storage.free_bytes(path)
    found = f"{path} can be written" + (f", {free / 2**30:.1f} GiB free" if free is not None else "")
    return _check("storage", whole, found, "a file that was replaced reads as the old one; choose another path")


def render(checks: Sequence[Check], width: int = 0) -> str:
    """One aligned line per check; what to do comes after an arrow.

    width: of the names, for checks that are printed one by one as they become known.
    """
    width = max((width, *(len(check.name) for check in checks)))
    return "\n".join(
        f"{'ok' if check.ok else '!!'} {check.name:<{width}}  {check.found}" + (f" -> {check.do}" if check.do else "")
        for check in checks
    )


def _check(name: str, ok: bool, found: str, do: str) -> Check:
    return Check(name, ok, found, "" if ok else do)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
