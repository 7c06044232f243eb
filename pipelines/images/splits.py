"""Find which split of a data set (train, validation, test) a file belongs to, by the words in its name."""

import re
from collections.abc import Sequence

from raydit.errors import InvalidInput, NotFound

SPLIT_OF_WORD = {"train": "train", "training": "train"}
SPLIT_OF_WORD |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLIT_OF_WORD |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
ALL_SPLITS = "all"


def split_of(name: str) -> str | None:
    """Return the split that a path names, or None. The deepest folder or file name wins, as on the Hugging Face hub.

    A word ends where letters end: "data/train-00000-of-00005.parquet" is train, "training_val.tar" validation.
    """
    words = re.findall(r"[a-z]+", name.rpartition(".")[0].lower() or name.lower())
    return next((SPLIT_OF_WORD[word] for word in reversed(words) if word in SPLIT_OF_WORD), None)


def pick_split(names: Sequence[str], split: str, where: str) -> list[str]:
    """Return the names that belong to a split; all names for "train" if none of them names any split.

    where: the data set, for messages. Raises InvalidInput if there is no such split, and NotFound if some of its
    numbered files are missing.
    """
    wanted = SPLIT_OF_WORD.get(split, split)
    splits = {name: split_of(name) or _split_of_numbered(name) for name in names}
    if split == ALL_SPLITS or (
        wanted == "train" and not any(found in SPLIT_OF_WORD.values() for found in splits.values())
    ):
        picked = list(names)
    else:
        picked = [name for name in names if splits[name] == wanted]
    _check_complete(picked, where)
    if not picked:
        known = ", ".join(sorted({found for found in splits.values() if found})) or "no splits"
        raise InvalidInput(
            f"images.split: found {split!r}",
            f"one of the splits of {where}: {known}",
            f'set images.split to one of them, or to "{ALL_SPLITS}"',
        )
    return picked


def _check_complete(names: Sequence[str], where: str) -> None:
    """Raise NotFound if a file of a numbered series "-00000-of-00005" is missing.

    Otherwise, a copy that was interrupted would look like a smaller data set.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in found.items():
        if len(numbers) < count:
            raise NotFound(
                f"images.path: found {len(numbers)} of {count} files {stem}-*-of-{count:05d} in {where}",
                "all of them",
                "copy the missing ones",
            )


def _split_of_numbered(name: str) -> str | None:
    """Return the split that a numbered file names by another word, such as "data/extra-00000-of-00002.parquet"."""
    match = re.search(r"([^/]+)-\d+-of-\d+\.\w+$", name)
    return match[1] if match else None
