"""Networks and tensors on several processes of a torch.distributed group: a copy in each, or a share in each.

torch.distributed.tensor and torch.distributed.fsdp, which take a while to import, are imported only where used.
"""

import warnings

import torch
from torch import Tensor, nn
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
    from torch.distributed.fsdp import fully_shard

    # The output is a view, which is of no harm where nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(network)
    return network


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece. Of sharded ones every process must call it, in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, and sharded as it is. Every process has the same whole tensor."""
    tensor = tensor.to(like.device)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Overwrite a tensor, sharded or not, by a whole one."""
    target.copy_(placed_like(source, target))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "full_tensor")
