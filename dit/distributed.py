"""Data-parallel networks, replicated (DDP) or sharded (FSDP2), and conversion between full and sharded tensors.

torch.distributed.tensor and torch.distributed.fsdp are imported where they are used, because importing them is slow.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def replicate_network(
    network: nn.Module, device: torch.device, *, some_unused: bool = False
) -> DistributedDataParallel:
    """Wrap a network for DDP: every process holds a full copy, and the backward pass all-reduces the gradients.

    some_unused: whether parameters take no part in some steps, which costs a search of the graph in every step.
    """
    # On CPUs, communication uses the same cores as the backward pass, and overlapping gains nothing: use one bucket.
    bucket_mb = 25 if device.type == "cuda" else 1000
    return DistributedDataParallel(
        network,
        broadcast_buffers=False,  # they are constants, such as tables of positions
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_mb,
        find_unused_parameters=some_unused,
    )


def shard_network(network: nn.Module) -> nn.Module:
    """Shard a network in place for FSDP2, block by block, and return it; its parameters become DTensors.

    Weights, gradients and optimizer state are then divided among the processes. For models that do not fit on one GPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # By default torch takes the machine's accelerator, also where these workers compute on the CPU.
    mesh = init_device_mesh(next(network.parameters()).device.type, (torch.distributed.get_world_size(),))
    # A returned view does no harm, because nothing writes into the output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def reshard(network: nn.Module) -> None:
    """Free the full parameters that a network sharded by `shard_network` holds after a forward pass without backward.

    FSDP2 keeps those of the root for a backward pass. Other networks are left as they are.
    """
    if hasattr(network, "reshard"):
        network.reshard()  # type: ignore[operator]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one, and any other tensor as it is.

    For sharded tensors this is a collective: all processes must call it, in the same order.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, and any other tensor as it is; both share their memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a full tensor, equal in all processes, on the device of `like` and sharded like it, if it is sharded."""
    tensor = tensor.to(like.device)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


@torch.no_grad()
def copy_full_tensor(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor, equal in all processes, into a tensor that may be sharded."""
    target.copy_(distribute_like(source, target))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a shard of the tensor."""
    return hasattr(tensor, "full_tensor")
