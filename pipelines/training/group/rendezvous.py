"""How the workers of a training group form torch's process group; on one machine without GPUs, by a file.

torch's default is a server in the first worker, which listens on every interface and believes whoever connects.

Ray Train's own TorchConfig would have its controller import torch, while all workers wait for the controller. Here only
the workers import it.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

from cluster.session import LOOPBACK
from dit.hardware.device_errors import worker_device
from pipelines.config.training import ElasticWorkersConfig

GPU_BACKENDS = "cpu:gloo,cuda:nccl"
"""As torch's own default. Objects, such as whether a worker was asked to stop, go by gloo; by NCCL they would wait for
all steps that are queued on the GPU."""
TIMEOUT_SECONDS = 1800
"""Time after which a collective operation fails, as in Ray Train."""
LEAVE_SECONDS = 30.0
"""Time that workers have to leave the process group before they are ended, as in Ray Train."""


@dataclass
class TorchGroupConfig(BackendConfig):
    """What `TorchGroup` is to set up."""

    backend: str
    """torch's name of the communication backend."""
    folder: str = ""
    """Folder for the file by which the workers find each other; "" for a server in the first worker."""

    @property
    def backend_cls(self) -> type["TorchGroup"]:
        return TorchGroup

    @property
    def train_func_context(self) -> Any:
        return on_own_gpu


class TorchGroup(Backend):
    """Sets up and ends the process group, from the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Let all workers join one process group."""
        import ray

        assert isinstance(backend_config, TorchGroupConfig)
        address: dict[str, str] = {}
        if backend_config.folder:
            # A group that starts again needs another file.
            init_method = f"file://{backend_config.folder}/{secrets.token_hex(8)}"
        else:
            init_method = "env://"
            host, port = worker_group.execute_single(0, get_address_and_port)
            address = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        group = {"backend": backend_config.backend, "init_method": init_method, "world_size": len(worker_group)}
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, join, address, world_rank=rank, **group) for rank in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Let all workers leave the process group, and give back the GPUs' cached memory."""
        import ray

        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(leave, len(worker_group) > 1), timeout=LEAVE_SECONDS)


def join(address: dict[str, str], **group: Any) -> None:
    """Join the process group, in a worker. address: environment variables. group: see Ray Train's function.

    Raises Failed if the workers compute on GPUs, and torch cannot use this one's.
    """
    from ray.train.torch import config

    if group["backend"] == GPU_BACKENDS:
        worker_device(1)
    os.environ.update(address)
    if address.get("MASTER_ADDR", LOOPBACK) == LOOPBACK:
        keep_gloo_on_loopback()
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(timeout_s=TIMEOUT_SECONDS, **group)


def leave(in_group: bool) -> None:
    """Leave the process group and free the GPU's cached memory, in a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=in_group)


@contextmanager
def on_own_gpu() -> Iterator[None]:
    """Make the worker's GPU torch's default for the block, in a worker."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


@contextmanager
def torch_group(workers: ElasticWorkersConfig) -> Iterator[TorchGroupConfig]:
    """Yield how the workers are to form a group, for the duration of the block.

    On a Ray on loopback they find each other by a file; with GPUs a file was not tested.
    """
    import ray.util

    if workers.gpus_per_worker or ray.util.get_node_ip_address() != LOOPBACK:
        yield TorchGroupConfig(GPU_BACKENDS if workers.gpus_per_worker else "gloo")
        return
    # Only this user can open the folder.
    with tempfile.TemporaryDirectory(prefix="raydit-workers-", ignore_cleanup_errors=True) as folder:
        yield TorchGroupConfig("gloo", folder)


def keep_gloo_on_loopback() -> None:
    """Let gloo listen on loopback; unless it is told an interface, it takes that of the machine's name."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    loopback = next((name for name, addresses in interfaces if any(a.address == LOOPBACK for a in addresses)), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
