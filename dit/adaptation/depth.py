"""Models with more or fewer blocks.

Target block i is a copy of base block round(i (D - 1) / (D' - 1)), D blocks becoming D': the first and the last are
always kept, and those between are evenly spaced. Of several copies of one block, the first is the block, and the
others start as the identity: what they add to the tokens is zero. More blocks therefore compute at first what the base
computes, and every copy learns from the first step on, because only the last factor of what it adds is zero.

In a U-ViT the rule holds for the shallow blocks, and the deep block that a skip connection joins to each goes with it.
A copy of a deep block that starts as the identity ignores its skip connection: its linear layer passes the tokens on.
"""

import math

import torch
from torch import Tensor

from dit.adaptation.draft_weights import Draft, TrainedModel
from dit.config import DiTConfig


def adapt_depth(draft: Draft, base: TrainedModel, target: TrainedModel) -> None:
    """Copy or drop blocks, so that the weights have the target's depth."""
    old, new = base.config.depth, target.config.depth
    if old == new:
        return
    if isinstance(base.config, DiTConfig):
        sources = [(f"blocks.{index}", source) for index, source in enumerate(source_blocks(old, new))]
        _arrange(draft, "blocks.", [(block, f"blocks.{source}") for block, source in sources])
        return
    shallow = source_blocks(old // 2, new // 2)
    _arrange(draft, "in_blocks.", [(f"in_blocks.{i}", f"in_blocks.{source}") for i, source in enumerate(shallow)])
    # From the last one on, which the first shallow block is joined to, so that the same copies are the identity.
    deep = [
        (f"out_blocks.{new // 2 - 1 - i}", f"out_blocks.{old // 2 - 1 - source}") for i, source in enumerate(shallow)
    ]
    _arrange(draft, "out_blocks.", deep)


def source_blocks(old: int, new: int) -> list[int]:
    """Return for each of `new` blocks the number of the block, of `old` ones, that it is a copy of."""
    step = (old - 1) / (new - 1) if new > 1 else 0.0
    return [math.floor(index * step + 0.5) for index in range(new)]


def _arrange(draft: Draft, prefix: str, sources: list[tuple[str, str]]) -> None:
    """Replace the blocks of a list. sources: for each new block the one that it is a copy of, by their names."""
    found = {name: draft.weights.pop(name) for name in [*draft.weights] if name.startswith(prefix)}
    seen: set[str] = set()
    for block, source in sources:
        copied = {
            f"{block}.{name[len(source) + 1 :]}": tensor
            for name, tensor in found.items()
            if name.startswith(f"{source}.")
        }
        identity = start_as_identity(block, copied) if source in seen else {}
        for name, tensor in copied.items():
            if name in identity:
                draft.change(name, identity[name], f"copy of {source} that starts as the identity")
            elif block != source:
                draft.change(name, tensor.clone(), f"copy of {source}")  # as no two may share memory in a file
            else:
                draft.weights[name] = tensor
        seen.add(source)
    draft.dropped += [name for name in found if ".".join(name.split(".")[:2]) not in seen]


def start_as_identity(block: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a block, by name, that must change for it to return its tokens as they are.

    With gates (adaLN-Zero) these are the gates, otherwise the last linear layer of every branch.
    """
    modulation = f"{block}.adaLN_modulation.1"
    width = weights[f"{block}.attn.proj.weight"].shape[0]
    if f"{modulation}.weight" in weights and weights[f"{modulation}.weight"].shape[0] == 6 * width:
        changed = {name: weights[name].clone() for name in (f"{modulation}.weight", f"{modulation}.bias")}
        for tensor in changed.values():
            for gate in (2, 5):  # of the six chunks: shift, scale and gate of attention, then those of the MLP
                tensor[gate * width : (gate + 1) * width] = 0
        return changed
    ends = (f"{block}.attn.proj.", f"{block}.cross_attn.proj.", f"{block}.mlp.fc2.")
    changed = {name: torch.zeros_like(tensor) for name, tensor in weights.items() if name.startswith(ends)}
    skip = f"{block}.skip_linear"
    if f"{skip}.weight" in weights:
        weight, bias = weights[f"{skip}.weight"], weights[f"{skip}.bias"]
        changed[f"{skip}.weight"] = torch.eye(*weight.shape, dtype=weight.dtype)
        changed[f"{skip}.bias"] = torch.zeros_like(bias)
    return changed
