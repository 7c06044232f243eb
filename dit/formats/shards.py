"""Weights in several files, shards, that an index lists: NAME.safetensors.index.json with a weight_map."""

import json
from pathlib import Path
from typing import Any

from dit.formats.weights import check_finite, read_weights
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file
from raydit.listed_names import require_all_inside

INDEX_SUFFIX = ".index.json"


def find_index(path: Path) -> Path | None:
    """Return the index that a path is, or the one in a folder; None if it is neither.

    Raises InvalidInput if a folder holds several.
    """
    if not path.is_dir():
        return path if path.name.endswith(INDEX_SUFFIX) else None
    found = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(found) > 1:
        raise InvalidInput(
            f"{path}: found {len(found)} indexes of shards ({', '.join(each.name for each in found[:3])})",
            "one of them",
            "name the index itself",
        )
    return found[0] if found else None


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the name of the file of each tensor, as an index lists them.

    Raises InvalidInput if it lists none or files elsewhere, and NotFound if a shard is missing.
    """
    refuse_lfs_pointer_file(index, "the index of the shards")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(require_all_inside(weight_map.values(), index)))
    except InvalidInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(
            f"{index}: found no index of shards ({type(error).__name__})", "a weight_map", "copy it again"
        ) from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise NotFound(
            f"{index}: found {len(names) - len(missing)} of {len(names)} shards; {missing[0]} is missing",
            "all of them beside their index",
            "copy the missing ones",
        )
    return weight_map


def list_shards(index: Path) -> tuple[Path, ...]:
    """Return the shards that an index lists, in the order of their names; raises as `read_weight_map`."""
    return tuple(index.parent / name for name in sorted(set(read_weight_map(index).values())))


def read_shards(index: Path, do: str = "copy the file again") -> dict[str, Any]:
    """Read all tensors that an index lists, without running code from the files.

    do: what to do about weights that are not finite, for which this raises InvalidInput, naming shard and tensor.
    Raises the same errors as `read_weight_map` and `dit.formats.weights.read_weights`, and InvalidInput unless each
    shard holds the tensors that are listed for it, and no others.
    """
    weight_map, tensors = read_weight_map(index), dict[str, Any]()
    for name in sorted(set(weight_map.values())):
        content = read_weights(index.parent / name)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in sorted(listed ^ content.keys(), key=str):
            if tensor in tensors or weight_map.get(tensor, name) != name:
                found, expected = f"holds {tensor}, which another shard is listed to hold", "each tensor once"
            elif tensor in content:
                found, expected = f"holds {tensor}, which the index does not list", "the tensors that it lists"
            else:
                found, expected = f"lacks {tensor}, which is listed for it", "the tensors that the index lists"
            raise InvalidInput(f"{index}: {name} {found}", expected, "copy the index and its shards again")
        check_finite(content, index.parent / name, do)
        tensors |= content
    return tensors
