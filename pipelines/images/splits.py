"""Which part of a data set a file belongs to (train, validation, test), by the words in its name."""

import re
from collections.abc import Sequence

WORDS = {"train": "train", "training": "train"}
WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
ALL = "all"


def split_of(name: str) -> str | None:
    """Part that the words of a path speak of, the deepest first, as on the Hugging Face hub; None if they do not.

    A word ends where letters end: "data/train-00000-of-00005.parquet" is train, "training_val.tar" validation.
    """
    words = re.findall(r"[a-z]+", name.rpartition(".")[0].lower() or name.lower())
    return next((WORDS[word] for word in reversed(words) if word in WORDS), None)


def pick_split(names: Sequence[str], split: str, where: str) -> list[str]:
    """The names that belong to a part; all of them, asked for "train", where no name speaks of any part.

    Raises ValueError if there is no such part, and FileNotFoundError if some of its numbered files are not there.
    """
    wanted = WORDS.get(split, split)
    parts = {name: split_of(name) or _numbered_part(name) for name in names}
    if split == ALL or (wanted == "train" and not any(part in WORDS.values() for part in parts.values())):
        picked = list(names)
    else:
        picked = [name for name in names if parts[name] == wanted]
    _check_whole(picked, where)
    if not picked:
        there = ", ".join(sorted({part for part in parts.values() if part})) or "no parts"
        raise ValueError(
            f"images.split: found {split!r}, expected one of the parts of {where}: {there}; set images.split to one of "
            f'them, or to "{ALL}"'
        )
    return picked


def _check_whole(names: Sequence[str], where: str) -> None:
    """Of files numbered "-00000-of-00005", none may be missing: a copy that was cut off looks like a small data set."""
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in found.items():
        if len(numbers) < count:
            raise FileNotFoundError(
                f"images.path: found {len(numbers)} of {count} files {stem}-*-of-{count:05d} in {where}, expected all; "
                "bring the others"
            )


def _numbered_part(name: str) -> str | None:
    """Parts of other names are known from numbered files alone: "data/extra-00000-of-00002.parquet"."""
    match = re.search(r"([^/]+)-\d+-of-\d+\.\w+$", name)
    return match[1] if match else None
