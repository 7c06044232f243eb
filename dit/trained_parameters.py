"""Which parameters of a network are trained, and at which share of the learning rate, by patterns over their names."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from raydit.errors import InvalidInput

BLOCK_LISTS = ("blocks", "in_blocks", "mid_block", "out_blocks", "head.blocks")
"""Lists of blocks, in the order in which tokens pass them."""
EMBEDDINGS = ("x_embedder.", "patch_embed.", "pos_embed")
"""First parts of the names of what comes before the blocks."""


def expand_braces(pattern: str, field: str) -> Iterator[str]:
    """Yield the patterns that one with braces stands for: "{0..11}" counts, ends included, and "{a,b}" enumerates.

    field: of the recipe, for messages. Raises InvalidInput for a range without numbers, and for one that counts down.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        if first > last:
            found = f"{field}: found the range {{{match[1]}}}, which counts down, in {pattern!r}"
            raise InvalidInput(found, "the lower number first", f"write {{{last}..{first}}}")
        choices: Iterable[str] = map(str, range(first, last + 1))
    else:
        choices = match[1].split(",")
        if ".." in match[1]:
            found = f"{field}: found the range {{{match[1]}}} in {pattern!r}"
            raise InvalidInput(found, "two numbers, such as {0..11}", "correct it")
    before, after = pattern[: match.start()], pattern[match.end() :]
    for choice in choices:
        yield from expand_braces(f"{before}{choice}{after}", field)


def match_parameters(pattern: str, names: Sequence[str], field: str, kind: str = "model's") -> list[str]:
    """Return the names that a glob with braces matches; "*" matches dots as well.

    field: of the recipe, and kind: of the parameters, for messages. Raises InvalidInput if it, or one that its braces
    stand for, matches none.
    """
    found: dict[str, None] = {}
    for simple in expand_braces(pattern, field):
        matching = [name for name in names if fnmatchcase(name, simple)]
        if not matching:
            close = difflib.get_close_matches(simple, [*names, *_modules(names)], n=1, cutoff=0.4)
            hint = f"a pattern such as {close[0]!r}" if close else "a pattern such as 'blocks.{0..5}.*'"
            also = f", one of {pattern!r}" if simple != pattern else ""
            raise InvalidInput(
                f"{field}: found {simple!r}{also}, which matches none of the {kind} {len(names)} parameters",
                hint,
                f"correct {field}",
            )
        found |= dict.fromkeys(matching)
    return list(found)


def _modules(names: Sequence[str]) -> list[str]:
    """Return a pattern for each module that has parameters."""
    split = [name.split(".") for name in names]
    return sorted({f"{'.'.join(parts[:end])}.*" for parts in split for end in range(1, len(parts))})


def frozen_names(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names of the parameters that train.start.freeze freezes. Raises InvalidInput if a pattern has none."""
    return {name for pattern in patterns for name in match_parameters(pattern, names, "train.start.freeze")}


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Stop parameters from being trained: they get no gradient, no state of the optimizer, and keep their average.

    patterns: globs over the names of parameters. Raises InvalidInput if one matches none, or if nothing is left.
    """
    parameters = dict(network.named_parameters())
    for name in frozen_names(patterns, [*parameters]):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InvalidInput(
            f"train.start.freeze: found {list(patterns)}, which freezes all parameters",
            "some that are trained",
            "remove some patterns",
        )


def count_trained(network: nn.Module) -> tuple[int, int]:
    """Return how many numbers of a network's parameters are trained, and how many there are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def learning_rate_multipliers(
    names: Sequence[str], trained: Sequence[str], patterns: Mapping[str, float] | None, layer_decay: float | None
) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter that has one, by its name.

    names: of all parameters, by which layers are numbered. trained: of those that are trained. patterns: factors by
    glob; a parameter that several match has their product. layer_decay: the factor from each block to the one before;
    see `layer_numbers`. Raises InvalidInput if a pattern matches no parameter that is trained.
    """
    factors: dict[str, float] = {}
    if layer_decay is not None:
        layers = dict(layer_numbers(names))
        last = max(layers.values()) + 1
        factors |= {name: math.pow(layer_decay, last - layer) for name, layer in layers.items()}
    for pattern, factor in (patterns or {}).items():
        for name in match_parameters(pattern, trained, "train.lr_multipliers", "trained"):
            factors[name] = factors.get(name, 1.0) * factor
    return factors


def layer_numbers(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the parameters that layer-wise decay slows down, each with the number of its layer.

    The embedding of patches and positions is 0, and blocks count from 1 in the order in which tokens pass them. The
    final layer has no number, nor have the embeddings of timesteps and labels, which every block reads. Source: Bao et
    al. 2021, BEiT, section 3.3 (https://arxiv.org/abs/2106.08254), for vision transformers.
    """
    blocks: dict[str, int] = {}
    by_block = {name: block for name in names if (block := _block_of(name))}
    for block in sorted(set(by_block.values()), key=_position):
        blocks[block] = len(blocks) + 1
    for name in names:
        if name in by_block:
            yield name, blocks[by_block[name]]
        elif name.startswith(EMBEDDINGS):
            yield name, 0


def _block_of(name: str) -> str | None:
    """Return the block that a parameter belongs to, such as "blocks.3"; None if it belongs to none."""
    match = re.match(r"((?:head\.)?blocks\.\d+|in_blocks\.\d+|mid_block|out_blocks\.\d+)\.", name)
    return match[1] if match else None


def _position(block: str) -> tuple[int, int]:
    kind, _, number = block.rpartition(".") if block != "mid_block" else (block, "", "0")
    return BLOCK_LISTS.index(kind), int(number)
