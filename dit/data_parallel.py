"""A network on several processes of a torch.distributed group: a copy in each, or a share of it in each."""

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def copy_network(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """A whole copy in every process, gradients averaged while backward runs (DDP)."""
    # On CPUs communication takes the cores that it would overlap with: one bucket costs least.
    bucket_mb = 25 if device.type == "cuda" else 1000
    return DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)


def shard_network(network: nn.Module) -> nn.Module:
    """Weights, gradients and what the optimiser keeps divided over the processes, block by block (FSDP2).

    For models that do not fit into one GPU. In place: the network's parameters become DTensors.
    """
    # The output is a view, which is of no harm where nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(network)
    return network
