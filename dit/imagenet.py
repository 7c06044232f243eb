"""The classes of ImageNet-1k, which published weights know by their numbers only, and the matching of class names.

imagenet_classes.tsv has a line for each class in the order of the labels: WordNet id, and names separated by commas.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

NUM_CLASSES = 1000
FILE = Path(__file__).parent / "imagenet_classes.tsv"


@functools.cache
def _synsets() -> tuple[tuple[str, str], ...]:
    """Return the WordNet id and all names of every class."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return tuple((id, names) for id, _, names in (line.partition("\t") for line in lines))


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """Return a unique name for every class, in the order of the labels: the first of its names, where others lack it.

    Two classes are called "crane" and nothing else: their WordNet ids distinguish them.
    """
    firsts = Counter(names.split(", ")[0] for _, names in _synsets())
    alls = Counter(names for _, names in _synsets())
    chosen = []
    for id, names in _synsets():
        first = names.split(", ")[0]
        chosen.append(first if firsts[first] == 1 else names if alls[names] == 1 else f"{names} ({id})")
    return tuple(chosen)


def imported_names(num_classes: int) -> list[str]:
    """Return names for the classes of weights that know their number only: ImageNet's thousand, or else numbers."""
    return [*imagenet_names()] if num_classes == NUM_CLASSES else [str(label) for label in range(num_classes)]


@functools.cache
def _ids_by_name() -> dict[str, str]:
    """Return the WordNet id of a class by each text that means no other class: the id, its name, all of its names."""
    ids: dict[str, str] = {}
    counts = Counter(names for _, names in _synsets())
    for (id, names), name in zip(_synsets(), imagenet_names(), strict=True):
        ids |= {id: id, name: id} | ({names: id} if counts[names] == 1 else {})
    return ids


def match_names(base: Sequence[str], target: Sequence[str]) -> list[int | None]:
    """Return for each of the target's classes the number of the base's class of that name; None for a new one.

    A class of ImageNet has the same name by its WordNet id (n01440764, the folder of its images), by the first of its
    names (tench), and by all of them (tench, Tinca tinca).
    """
    rows = {name: row for row, name in reversed([*enumerate(base)])}
    if all(name in rows for name in target):
        return [rows[name] for name in target]
    ids = _ids_by_name()
    rows_by_id = {ids[name]: row for name, row in rows.items() if name in ids}
    return [rows.get(name, rows_by_id.get(ids.get(name, ""))) for name in target]
