"""How the workers of a group find each other on this machine, on a real Ray."""

import tempfile
from pathlib import Path

import pytest

from pipelines.config.training import WorkersConfig
from pipelines.training.group.rendezvous import TorchGroupConfig, torch_group


@pytest.mark.slow
def test_a_group_of_two_listens_on_loopback_only_and_leaves_nothing_behind(local_ray, tmp_path):
    from ray.train import RunConfig, ScalingConfig

    from pipelines.training.group.trainer import GroupTrainer

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
    with torch_group(WorkersConfig()) as group:
        GroupTrainer(
            report_ports,
            backend_config=group,
            train_loop_config={"folder": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray")),
        ).fit()
    for rank in range(2):
        total, *addresses = (tmp_path / str(rank)).read_text().split()
        assert total == "2" and len(addresses) >= 2  # Ray's port and gloo's
        assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    assert set(Path(tempfile.gettempdir()).glob("raydit-workers-*")) == before


def test_workers_with_gpus_or_on_a_cluster_meet_at_a_server(local_ray, monkeypatch):
    with torch_group(WorkersConfig()) as here, torch_group(WorkersConfig(gpus_per_worker=1)) as gpus:
        assert here.backend == "gloo" and Path(here.folder).stat().st_mode & 0o777 == 0o700
        assert gpus == TorchGroupConfig("cpu:gloo,cuda:nccl", "")
    assert not Path(here.folder).exists()
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.2")
    with torch_group(WorkersConfig()) as elsewhere:
        assert elsewhere == TorchGroupConfig("gloo", "")


@pytest.mark.slow
def test_workers_that_meet_at_a_server_form_a_group(local_ray, tmp_path):
    from ray.train import RunConfig, ScalingConfig

    from pipelines.training.group.trainer import GroupTrainer

    def add_up(config):
        import os

        import torch
        from torch import distributed

        total = torch.tensor(float(distributed.get_rank() + 1))
        distributed.all_reduce(total)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
        Path(config["folder"], os.environ["RANK"]).write_text(f"{total.item():.0f} {[os.environ[n] for n in names]}")

    GroupTrainer(
        add_up,
        backend_config=TorchGroupConfig("gloo"),
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    for rank in "01":
        assert (tmp_path / rank).read_text() == f"3 {[rank, '2', rank, '127.0.0.1']}"
