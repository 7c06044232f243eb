"""Print the packages that raydit needs and that another machine lacks, one a line.

    python tests/benchmarks/missing_packages.py FILE_WITH_NAMES [EXTRA_PACKAGE...]

The file holds the names of the packages that the machine has, separated by blanks or commas, as in the first column of
`pip list`. Run it where raydit and all that it needs are installed: requirements are read from the installed packages'
metadata. Packages that are given besides, such as torchao, are included with what they need. Packages that only come
with an extra of raydit are not.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement


def missing_packages(wanted: Iterable[str], available: Iterable[str]) -> list[str]:
    """Return the wanted packages, and all that these need, without what is available; in alphabetical order.

    What an available package needs is taken to be available too.
    """
    present = {canonical(name) for name in available}
    found, pending = set(), [Requirement(name) for name in wanted]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        requirement = pending.pop()
        name, extras = canonical(requirement.name), frozenset(requirement.extras)
        if name in present or (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        pending += [each for each in requirements_of(name) if applies(each, extras)]
    return sorted(found)


def requirements_of(name: str) -> list[Requirement]:
    """Return what an installed package requires; nothing of a package that is not installed here."""
    try:
        return [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return []


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement holds here, for a package that is installed with some extras."""
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": each}) for each in ("", *extras))


def canonical(name: str) -> str:
    """Return the form of a package's name in which equal names are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(file: str, *further: str) -> None:
    available = re.split(r"[\s,]+", Path(file).read_text().strip(" \n.,"))
    for name in missing_packages(("raydit", *further), available):
        if name != "raydit":
            print(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
