"""Compilation block by block: the code compiled for one block serves all blocks of its kind.

A whole network takes longer to compile the deeper it is, and a block does not. Speed is nearly the same, because few
kernels could be shared by two blocks.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from dit.layers.head import WideHead

MAX_COMPILED_VARIANTS = 64
"""Variants of one kind of block that torch compiles in a process; it leaves further ones uncompiled, with a warning.

A model has up to four: for training, for validation, and for sampling with guidance and without; a U-ViT has twice as
many, for its blocks with skip and without. Models of other widths have their own. torch's own limit is 8.
"""


def compile_network(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated blocks of a network in place. A block is compiled when it is first called.

    network: a DiT or U-ViT that is not yet wrapped for DDP or sharded for FSDP2. Names of parameters stay as they are.
    Code is compiled for one size of batch, with or without gradients; a call that differs in these compiles again.
    backend: that of torch.compile; tests use one that counts compilations.
    """
    import torch._dynamo.config as dynamo

    blocks = repeated_blocks(network)
    assert blocks, f"{type(network).__name__} has no list of blocks; of a wrapped network, compile the network inside"
    # Both settings hold for the calling thread alone.
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_COMPILED_VARIANTS)
    # Otherwise a block's graph is cut wherever a bucket of DDP ends, so that gradients are communicated before the
    # backward pass is over. They are between blocks anyway.
    dynamo.optimize_ddp = False
    for block in blocks:
        # Static shapes, because few sizes of batch occur, and kernels for one size are faster.
        block.compile(backend=backend, dynamic=False)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules in a network's lists, and others of the same classes, such as the middle block of a U-ViT.

    The blocks of a DiT's wide head are a list, and a kind, of their own.
    """
    # Not the lists inside blocks, as autoencoders have them: a part of a compiled block is not compiled once more.
    owners = [network, *(child for child in network.children() if isinstance(child, WideHead))]
    lists = [child for owner in owners for child in owner.children() if isinstance(child, nn.ModuleList)]
    kinds = {type(block) for blocks in lists for block in blocks}
    return [module for module in network.modules() if type(module) in kinds]
