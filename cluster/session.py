"""Join a Ray cluster, or start Ray on this machine, and check that a stage's workers fit on it.

A Ray that is started here listens on loopback only; what else listens while it runs is in cluster/README.md, "Ports".
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from cluster import signals
from cluster.address import given_address, is_on_loopback_only, refuse_wrong_address
from cluster.credentials import protect_token_file
from cluster.environment import environment_variable
from cluster.node_tasks import call_on_nodes
from cluster.placement import RayNode, WorkerNeeds, can_grow_to, count_workers, explain_missing_resources
from raydit.compilers import lacks_compiler, no_compiler
from raydit.errors import Unreachable

LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 30.0
"""Time that nodes have to say whether they have a compiler."""
LOCAL_ENVIRONMENT = {
    # Keep freed memory: convolutions allocate and free tens of megabytes per layer, and with glibc's defaults every
    # page of them is new. This makes features of EfficientNet-Lite0 1.3 times as fast.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
    # Tasks of actors run in threads; glibc returns the memory of their own arenas regardless of the thresholds.
    "MALLOC_ARENA_MAX": "1",
    # Ray's own store may be a moment later than its client, which would wait for a second before it tries again.
    "RAY_raylet_client_connect_timeout_milliseconds": "100",
    "RAY_raylet_client_num_connect_attempts": "100",
    # Saves a process in every training group: this machine is not preempted.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def load_ray() -> None:
    """Import ray with the settings that it reads while it is imported."""
    # Otherwise C++ code prints its stack when SIGTERM arrives while Ray starts.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    import ray  # noqa: F401


@contextlib.contextmanager
def ray_session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Use a Ray cluster for the duration of the block, and disconnect from it or stop it afterwards.

    address: "HOST:PORT" of a cluster to join, "auto" for the one that runs on this machine, "local" to start one. None
    stands for RAY_ADDRESS, which Ray sets inside a submitted job, or else for "local". If Ray is already initialized,
    for example in a notebook, it is used and left running.
    num_cpus: minimum of logical CPUs when Ray is started here. With more than the machine has, all workers can start
    on a small machine and share its cores.
    Raises InvalidInput for an address of the wrong kind, and Unreachable if no Ray can be joined there.
    """
    load_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    refuse_wrong_address(address)
    address, _ = given_address(address)
    try:
        # A connection that is interrupted midway crashes the process at its end.
        with signals.defer_signals():
            if address == "local":
                _start_local(num_cpus)
            else:
                _join(address)
        yield
    finally:
        with signals.defer_signals():
            ray.shutdown()


def _start_local(num_cpus: int | None) -> None:
    """Start Ray for this process only; Ray itself sizes the object store and creates a token."""
    import ray

    protect_token_file()
    # The processes that Ray starts inherit the environment.
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for last_attempt in (False, True):
        try:
            with _on_loopback(), _only_what_is_needed():
                ray.init(
                    "local",
                    num_cpus=max(os.cpu_count() or 1, num_cpus or 0),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:
            # Ray waits at most 30 seconds for its own processes, which is too short on a busy machine.
            if last_attempt or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that starts in this block have the address 127.0.0.1, so that all its processes listen there only.

    One that is joined keeps this address, too.

    Ray chooses this address itself where it supports no clusters, on macOS and Windows; on Linux, and as
    `_node_ip_address`, it replaces it by the machine's own, and then listens on every interface.
    """
    from ray._private import ray_constants

    with (
        # For the processes that start; in this one it was read when ray was imported.
        environment_variable(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"),
        _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),
    ):
        yield


@contextlib.contextmanager
def _only_what_is_needed() -> Iterator[None]:
    """Start no log monitor and no autoscaler with a Ray that starts in this block, and give its agent a free port.

    Logs are not sent to the driver, and one machine cannot grow; each of the two processes takes half a second of a
    core while Ray starts. So does the import of the dashboard's packages, by which Ray finds out whether they are
    installed; they are, because raydit requires them. The agent's default port is a fixed one; where another Ray of
    this machine has it, the start takes some seconds longer. `ray.init` has no options for any of this.

    The processes are in a session of their own, because a signal to the command's process group, as `timeout` sends it,
    would end Ray while the command still needs it to end well. They do not outlive the command: the kernel ends them.
    """
    from ray._private import parameter, services, utils

    class LocalRayParams(parameter.RayParams):
        def __init__(self, **settings: Any) -> None:
            settings |= {"include_log_monitor": False, "no_monitor": True, "dashboard_agent_listen_port": 0}
            super().__init__(**settings)

    with (
        _replaced(parameter, "RayParams", LocalRayParams),
        _replaced(utils, "get_dashboard_dependency_error", lambda: None),
        _replaced(services, "ConsolePopen", functools.partial(services.ConsolePopen, start_new_session=True)),
    ):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module for the duration of the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _join(address: str) -> None:
    import ray

    try:
        with _on_loopback() if is_on_loopback_only(address) else contextlib.nullcontext():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise Unreachable(
            f"Ray {ray.__version__} could not join the cluster at {address} ({str(error).strip()})",
            "a cluster of the same Ray and Python version",
            "install the same versions",
        ) from error


def require_resources(num_workers: int, needs: WorkerNeeds, stage: str) -> None:
    """Raise InvalidInput if a stage's workers can never fit on the cluster, because Ray would wait for them forever.

    This compares with all resources of the nodes, not with the free ones, since workers may wait on a busy cluster.
    For an autoscaling cluster the largest size that it may reach counts.
    """
    import ray
    from ray._private.state import state

    missing = explain_missing_resources([node for node in ray.nodes() if node["Alive"]], num_workers, needs, stage)
    if missing and not can_grow_to(state.get_max_resources_from_cluster_config() or {}, num_workers, needs):
        raise missing


def require_compilers(num_workers: int, needs: WorkerNeeds) -> None:
    """Raise Failed if a stage compiles networks, and its workers never fit on nodes that have a compiler for that.

    A node that does not answer in time, or that an autoscaler may add, counts as one that has: its workers look again.
    """
    import ray
    from ray._private.state import state

    gpu = bool(needs.gpus)
    replies = call_on_nodes(lacks_compiler, gpu, timeout_seconds=ANSWER_SECONDS)
    lacking = {reply.address for reply in replies if reply.result}
    nodes = [node for node in ray.nodes() if node["Alive"] and count_workers(node, needs)]
    having = [node for node in nodes if node["NodeManagerAddress"] not in lacking]
    if len(having) == len(nodes) or sum(count_workers(node, needs) for node in having) >= num_workers:
        return
    if not can_grow_to(state.get_max_resources_from_cluster_config() or {}, num_workers, needs):
        raise no_compiler(gpu, ", ".join(sorted(lacking & {node["NodeManagerAddress"] for node in nodes})))


def count_free_workers(needs: WorkerNeeds) -> float:
    """Return how many workers the cluster has room for now, beside what runs on it."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = (RayNode(Resources=free.get(node["NodeID"], {}), Labels=node["Labels"]) for node in ray.nodes())
    return sum(count_workers(node, needs) for node in nodes)
