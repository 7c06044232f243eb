"""Conversion of adapters between official names and those of diffusers' DiTTransformer2DModel.

diffusers has separate layers for queries, keys and values, and a copy of both embedders in every block. An adapter of
the fused layer becomes one of each, with the same A and a third of B; three adapters become one of three times the
rank, unless they have the same A.
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dit.formats.adapter import AdapterConfig, AdapterWeights, Factors
from dit.formats.diffusers_weights import BLOCK, EMBEDDERS, ENDS
from raydit.errors import InvalidInput


def adapter_for_diffusers(adapter: AdapterWeights, depth: int) -> AdapterWeights:
    """Return an adapter of diffusers' layers that changes the same. depth: of the model.

    Raises InvalidInput for layers that diffusers' model does not have, and for parameters that are trained in full.
    """
    if adapter.full:
        raise InvalidInput(
            f"found parameters that are trained in full ({next(iter(adapter.full))})",
            "low-rank factors alone, which is all that this layout is for",
            "merge the checkpoint, and export the result (--format diffusers)",
        )
    factors: dict[str, Factors] = {}
    for name, pair in adapter.factors.items():
        names = list(_theirs(name, depth))
        if not names:
            raise InvalidInput(
                f"found an adapter of {name}, which diffusers' model has no layer for",
                "layers of an adaLN-Zero DiT",
                "use --format peft instead",
            )
        split = name.endswith("attn.qkv")
        parts = pair.up.chunk(3) if split else (pair.up,) * len(names)
        factors |= {theirs: Factors(pair.down, up, pair.scale) for theirs, up in zip(names, parts, strict=True)}
    return AdapterWeights(factors, {})


def _theirs(name: str, depth: int) -> Iterator[str]:
    """Yield diffusers' names of a layer."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        yield from (f"transformer_blocks.{match[1]}.{part}" for part in BLOCK.get(match[2], ()))
    elif name in ENDS:
        yield ENDS[name]
    elif name in EMBEDDERS:
        yield from (f"transformer_blocks.{block}.norm1.emb.{EMBEDDERS[name]}" for block in range(depth))


def adapter_from_diffusers(adapter: AdapterWeights, depth: int, width: int) -> AdapterWeights:
    """Return an adapter of official layers that changes the same; one of official layers is returned as it is.

    depth, width: of the model. Raises InvalidInput for layers that a DiT of these sizes does not have, and for copies
    of an embedder that are changed differently, because DiT has one for all blocks.
    """
    if not any(name.startswith(("transformer_blocks.", "proj_out_", "pos_embed.")) for name in adapter.factors):
        return adapter
    layers = [f"blocks.{block}.{part}" for block in range(depth) for part in BLOCK] + [*ENDS, *EMBEDDERS]
    left = dict(adapter.factors)
    factors: dict[str, Factors] = {}
    for ours in layers:
        names = list(_theirs(ours, depth))
        found = {name: left.pop(name) for name in names if name in left}
        if not found:
            continue
        factors[ours] = _fused(names, found, width) if ours.endswith("attn.qkv") else _one(ours, names, found)
    if left or adapter.full:
        other = next(iter({**left, **adapter.full}))
        raise InvalidInput(
            f"found an adapter of {other}, which DiT has no layer for", "an adapter of a DiT", "choose another one"
        )
    return AdapterWeights(factors, {})


def _one(ours: str, names: list[str], found: Mapping[str, Factors]) -> Factors:
    first = next(iter(found.values()))
    same = all(
        each.scale == first.scale and each.up.equal(first.up) and each.down.equal(first.down) for each in found.values()
    )
    if len(found) < len(names) or not same:
        raise InvalidInput(
            f"found different adapters of {names[0]} and its copies in other blocks",
            f"equal ones, because DiT has one {ours} for all blocks",
            "choose an adapter that leaves the embedders alone",
        )
    return first


def _fused(names: list[str], found: Mapping[str, Factors], width: int) -> Factors:
    """Return the factors of queries, keys and values as those of the layer that computes all three.

    Raises InvalidInput for factors of a layer of another width.
    """
    for name, each in found.items():
        shape = len(each.up), each.down.shape[1]
        if shape != (width, width):
            raise InvalidInput(
                f"found an adapter of another model: it changes {name} {shape}",
                f"({width}, {width}), as the base has it",
                "choose the base that it was trained on",
            )
    first = next(iter(found.values()))
    if len(found) == 3 and all(each.scale == first.scale and each.down.equal(first.down) for each in found.values()):
        return Factors(first.down, torch.cat([found[name].up for name in names]), first.scale)
    # The scale is one for all three: it becomes part of B where they differ.
    rows: list[Tensor] = []
    scale = first.scale if len({each.scale for each in found.values()}) == 1 else 1.0
    rank = sum(len(each.down) for each in found.values())
    start = 0
    for name in names:
        row = torch.zeros(width, rank)
        if (pair := found.get(name)) is not None:
            own = slice(start, start + len(pair.down))
            row[:, own] = pair.up if pair.scale == scale else pair.up * pair.scale
            start = own.stop
        rows.append(row)
    down = torch.cat([found[name].down for name in names if name in found])
    return Factors(down, torch.cat(rows), scale)


def written_form(adapter: AdapterWeights) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return what `dit.formats.adapter.write_adapter` writes for an adapter: its layers get one rank and one scale.

    Smaller factors are padded with zeros, and other scales become part of B, which is exact for powers of two and to
    rounding otherwise.
    """
    rank = max(len(pair.down) for pair in adapter.factors.values())
    scales = {pair.scale for pair in adapter.factors.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    padded: dict[str, Factors] = {}
    for name, pair in adapter.factors.items():
        down, up = torch.zeros(rank, pair.down.shape[1]), torch.zeros(len(pair.up), rank)
        down[: len(pair.down)] = pair.down
        up[:, : len(pair.down)] = pair.up if pair.scale == scale else pair.up * pair.scale
        padded[name] = Factors(down, up, scale)
    assert math.isfinite(scale), "read_adapter refuses others"
    config = AdapterConfig(rank=rank, alpha=scale * rank, layers=tuple(padded), full=tuple(adapter.full))
    return config, AdapterWeights(padded, adapter.full).tensors
