"""Tensors that may be cut into shards over several processes, as FSDP2 does: made whole, and made from whole ones.

torch.distributed.tensor, which takes a while to import, is imported only where there is such a tensor.
"""

import torch
from torch import Tensor


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
