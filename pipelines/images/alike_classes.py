"""Notice names of classes that look alike: they are different classes, but hardly ever meant to be."""

import unicodedata
from collections.abc import Callable, Sequence


def note_alike_classes(names: Sequence[str]) -> tuple[str, ...]:
    """Return a line if some classes differ by surrounding blanks or by how Unicode spells their letters alone.

    "é" is one character or two, depending on the system that wrote it.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_normalised(name), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return ()
    shown = "; ".join(" and ".join(map(_show(group), group)) for group in alike[:3])
    return (
        f"{sum(map(len, alike)):,} of {len(names):,} classes differ from another one by surrounding blanks or by the "
        f"encoding of letters alone ({shown}{'; ...' if len(alike) > 3 else ''}): if they are meant to be one, correct "
        "the labels, or the names of the folders",
    )


def _normalised(name: str) -> str:
    """Return what names that look alike have in common."""
    return name.strip() if name.isascii() else unicodedata.normalize("NFC", name.strip())


def _show(group: Sequence[str]) -> Callable[[str], str]:
    """Return what shows the names of a group: as text, or with escapes if they print alike."""
    return repr if len({name.strip() for name in group}) == 1 else ascii
