"""Sharded networks stay on the device of their workers, whatever accelerator the machine has."""

import pytest
import torch
import torch.distributed as distributed
from torch import nn

from dit.distributed import shard_network


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_network_on_the_cpu_is_sharded_there_on_a_machine_with_a_gpu(group, monkeypatch):
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    network = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2))
    parameters = [*shard_network(network).parameters()]
    assert {parameter.device_mesh.device_type for parameter in parameters} == {"cpu"}
    assert {parameter.device.type for parameter in parameters} == {"cpu"}
