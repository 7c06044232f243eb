"""A Ray to work in: joined where one is given, started on this machine where none is."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

from cluster.placement import WorkerNeeds, can_grow_to, what_is_missing

LOCAL_ENVIRONMENT = {
    # Keep freed memory: convolutions free and take tens of megabytes per layer, and with glibc's defaults every
    # page of it is new. Features of EfficientNet-Lite0 come 1.3 times as fast.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
    # Tasks of actors run in threads, whose arenas of their own glibc gives back whole, whatever the thresholds.
    "MALLOC_ARENA_MAX": "1",
    # One process less in every training group: nobody reclaims this machine.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@contextlib.contextmanager
def ray_session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Work inside a Ray cluster, and leave or stop it afterwards.

    address: "HOST:PORT" of a cluster to join, "auto" for the one running on this machine, "local" for a fresh
    one. None takes RAY_ADDRESS, which Ray sets inside a submitted job, else "local". When Ray is already
    initialised, for example in a notebook, that one is used and left running.
    num_cpus: logical CPUs that a fresh Ray must offer; more than the machine has lets all workers of a small
    machine start, and they share its cores.

    Raises ValueError for an address of the wrong kind and ConnectionError when no Ray can be joined there.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            _start_local(num_cpus)
        else:
            _join(address)
        yield
    finally:
        ray.shutdown()


def _start_local(num_cpus: int | None) -> None:
    """Start Ray for this process only; Ray itself sizes the object store and makes a token."""
    import ray

    # The processes of this Ray inherit it.
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for last_attempt in (False, True):
        try:
            ray.init(
                "local",
                num_cpus=max(os.cpu_count() or 1, num_cpus or 0),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            # Ray waits for its own processes no longer than 30 seconds, too short on a machine that is busy.
            if last_attempt or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _join(address: str) -> None:
    import ray

    _check_address(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise ConnectionError(
            f"the Ray at {address} could not be joined by Ray {ray.__version__}: {error} "
            "Expected a cluster of the same Ray and Python version; one with token authentication needs "
            "RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH before Python starts"
        ) from error


def _check_address(address: str) -> None:
    """Refuse at once what Ray would try for two minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in host:
        raise ValueError(
            f'found the Ray address {address!r}, expected "HOST:PORT" of a cluster that this machine '
            'belongs to (port 6379 by default), "auto" or "local"; from outside a cluster use: raydit submit'
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray answers at {address} ({error}); expected the address that `ray start --head` printed, "
            "check it and the firewall, or leave it out for a local Ray"
        ) from error


def require_resources(
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    stage: str,
    *,
    accelerator_type: str | None = None,
    label_selector: dict[str, str] | None = None,
) -> None:
    """Raise ValueError if the cluster can never hold a stage's workers, for which Ray would wait for ever.

    What counts is what the nodes have, not what is free: a busy cluster makes us wait, which is right. On a
    cluster that grows by itself the largest size it may reach counts.
    """
    import ray
    from ray._private.state import state

    needs = WorkerNeeds(
        cpus=cpus_per_worker,
        gpus=gpus_per_worker,
        accelerator_type=accelerator_type,
        label_selector=label_selector or {},
    )
    missing = what_is_missing([node for node in ray.nodes() if node["Alive"]], num_workers, needs, stage)
    if missing and not can_grow_to(state.get_max_resources_from_cluster_config() or {}, num_workers, needs):
        raise ValueError(missing)
