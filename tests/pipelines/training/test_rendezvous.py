"""How the workers of a group find each other on this machine, on a real Ray."""

import tempfile
from pathlib import Path

import pytest

from pipelines.config.training import WorkersConfig
from pipelines.training.rendezvous import local_torch_config


@pytest.mark.slow
def test_a_group_of_two_listens_on_loopback_only_and_leaves_nothing_behind(local_ray, tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def report_ports(config):
        import psutil
        import torch
        from torch import distributed

        total = torch.ones(1)
        distributed.all_reduce(total)
        connections = psutil.Process().net_connections("tcp")
        found = [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
        Path(config["folder"], str(distributed.get_rank())).write_text(f"{total.item():.0f} {' '.join(found)}")

    before = set(Path(tempfile.gettempdir()).glob("raydit-workers-*"))
    with local_torch_config(WorkersConfig()) as torch_config:
        TorchTrainer(
            report_ports,
            torch_config=torch_config,
            train_loop_config={"folder": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray")),
        ).fit()
    for rank in range(2):
        total, *addresses = (tmp_path / str(rank)).read_text().split()
        assert total == "2" and len(addresses) >= 2  # Ray's port and gloo's
        assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    assert set(Path(tempfile.gettempdir()).glob("raydit-workers-*")) == before


def test_workers_with_gpus_or_on_a_cluster_are_left_to_ray(local_ray, monkeypatch):
    with local_torch_config(WorkersConfig()) as here, local_torch_config(WorkersConfig(gpus_per_worker=1)) as gpus:
        assert here is not None and gpus is None
        assert Path(here.folder).stat().st_mode & 0o777 == 0o700
    assert not Path(here.folder).exists()
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.2")
    with local_torch_config(WorkersConfig()) as elsewhere:
        assert elsewhere is None
