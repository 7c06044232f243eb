"""How the workers of a training group find each other where all of them are on this machine: by a file.

torch's default is a server in the first worker, which listens on every interface and believes whoever connects.
"""

import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from cluster.session import LOOPBACK
from pipelines.config.training import ElasticWorkersConfig

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig


def local_torch_config(workers: ElasticWorkersConfig) -> "TorchConfig | None":
    """Return how Ray Train is to connect the workers of a Ray on loopback; None for its own way.

    That is for every other Ray, and for workers with GPUs, with which a file was not tested.
    """
    import ray.util

    if workers.gpus_per_worker or ray.util.get_node_ip_address() != LOOPBACK:
        return None
    return _file_config()


def _file_config() -> "TorchConfig":
    import ray
    from ray.train.torch import config

    class FileBackend(config._TorchBackend):
        """Ray Train's backend for CPUs, with a file in place of a server."""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            self.folder = tempfile.mkdtemp(prefix="raydit-workers-")  # only this user can open it
            settings: dict[str, Any] = {"backend": "gloo", "init_method": f"file://{self.folder}/store"}
            settings |= {"world_size": len(worker_group), "timeout_s": backend_config.timeout_s}
            worker_group.execute(config._set_torch_distributed_env_vars)
            worker_group.execute(_keep_gloo_on_loopback)
            join = config._setup_torch_process_group
            ranks = range(len(worker_group))
            ray.get([worker_group.execute_single_async(rank, join, world_rank=rank, **settings) for rank in ranks])

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            try:
                super().on_shutdown(worker_group, backend_config)
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)

    class FileConfig(config.TorchConfig):
        @property
        def backend_cls(self) -> type[FileBackend]:
            return FileBackend

    return FileConfig()


def _keep_gloo_on_loopback() -> None:
    """Let gloo listen on loopback; unless it is told an interface, it takes that of the machine's name."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    loopback = next((name for name, addresses in interfaces if any(a.address == LOOPBACK for a in addresses)), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
