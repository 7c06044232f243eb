"""How the workers of a training group find each other where all of them are on this machine: by a file.

torch's default is a server in the first worker, which listens on every interface and believes whoever connects.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.session import LOOPBACK
from pipelines.config.training import ElasticWorkersConfig

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig


@contextmanager
def local_torch_config(workers: ElasticWorkersConfig) -> Iterator["TorchConfig | None"]:
    """Yield how Ray Train is to connect the workers of a Ray on loopback, for the block; None for its own way.

    That is for every other Ray, and for workers with GPUs, with which a file was not tested.
    """
    import ray.util

    if workers.gpus_per_worker or ray.util.get_node_ip_address() != LOOPBACK:
        yield None
        return
    # Only this user can open the folder.
    with tempfile.TemporaryDirectory(prefix="raydit-workers-", ignore_cleanup_errors=True) as folder:
        yield _file_config(folder)


def _file_config(folder: str) -> "TorchConfig":
    import ray
    from ray.train.torch import config

    class FileBackend(config._TorchBackend):
        """Ray Train's backend for CPUs, with a file in place of a server."""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            store = f"file://{backend_config.folder}/{secrets.token_hex(8)}"  # a group that starts again needs another
            settings: dict[str, Any] = {"backend": "gloo", "init_method": store}
            settings |= {"world_size": len(worker_group), "timeout_s": backend_config.timeout_s}
            worker_group.execute(config._set_torch_distributed_env_vars)
            worker_group.execute(_keep_gloo_on_loopback)
            join = config._setup_torch_process_group
            ranks = range(len(worker_group))
            ray.get([worker_group.execute_single_async(rank, join, world_rank=rank, **settings) for rank in ranks])

    @dataclass
    class FileConfig(config.TorchConfig):
        folder: str = ""

        @property
        def backend_cls(self) -> type[FileBackend]:
            return FileBackend

    return FileConfig(folder=folder)


def _keep_gloo_on_loopback() -> None:
    """Let gloo listen on loopback; unless it is told an interface, it takes that of the machine's name."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    loopback = next((name for name, addresses in interfaces if any(a.address == LOOPBACK for a in addresses)), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
