"""A stack of blocks, of which the backward pass may recompute each (gradient checkpointing).

Source: Chen et al. 2016 (https://arxiv.org/abs/1604.06174).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: nn.ModuleList, x: Tensor, c: Tensor, rotation: Tensor | None, *, recompute: bool) -> Tensor:
    """Pass tokens x (N, T, D) through blocks, each called with the condition c and rotary positions, or None.

    recompute: whether the backward pass computes what is inside of a block anew; only its input is kept then.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            # Blocks draw no random numbers, whose state would otherwise be read from the GPU for each block.
            x = checkpoint(block, x, c, rotation, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, c, rotation)
    return x
