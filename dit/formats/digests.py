"""Checks that the files of a checkpoint are those that its COMPLETE lists, made where a file is used."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit.files import sha256_of
from dit.formats.completion import COMPLETE
from raydit.errors import InvalidInput
from raydit.listed_names import require_all_inside
from raydit.regular_files import read_regular

MAX_JSON_BYTES = 2**26
"""Longest JSON file of a checkpoint that is read; a config with the names of a million classes is shorter."""


def parse_digests(content: bytes, where: object) -> dict[str, str]:
    """Read the content of COMPLETE: the sha256 of every other file by its name in the folder.

    where: its path. Raises InvalidInput for anything else, and for names outside of the folder.
    """
    try:
        digests = json.loads(content)
    except (ValueError, RecursionError):
        digests = None
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise InvalidInput(f"{where}: found no digests", "the sha256 of every file by its name", "copy it again")
    require_all_inside(digests, where)
    return digests


def parse_recorded(content: bytes, where: object, expected: str | None) -> dict[str, Any]:
    """Read a JSON object whose sha256 COMPLETE records. where: its path.

    Raises InvalidInput if its digest is another one or if it holds no JSON object.
    """
    require_digest(hashlib.sha256(content).hexdigest(), where, expected)
    return _parse_object(content, where)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InvalidInput for anything else."""
    return _parse_object(read_regular(file, MAX_JSON_BYTES), file)


def _parse_object(content: bytes, where: object) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: found no JSON object", "what raydit wrote", "copy the checkpoint again")
    return value


def read_recorded(folder: Path, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Read a JSON file of a checkpoint's folder; see `parse_recorded`."""
    return parse_recorded(read_regular(folder / name, MAX_JSON_BYTES), folder / name, digests.get(name))


def require_recorded(
    folder: Path, name: str, digests: Mapping[str, str], sha256: Callable[[Path], str] = sha256_of
) -> None:
    """Raise InvalidInput unless a file has the digest that COMPLETE records. sha256: how to take the digest."""
    require_digest(sha256(folder / name), folder / name, digests.get(name))


def require_digest(found: str, where: object, expected: str | None) -> None:
    """Raise InvalidInput unless the sha256 of a file is the recorded one. expected: None if the file is not listed."""
    if expected is None:
        raise InvalidInput(
            f"{where}: found a file that {COMPLETE} does not list", "a file of the checkpoint", "remove the file"
        )
    if found != expected:
        raise InvalidInput(
            f"{where}: the file changed after it was written: found sha256 {found[:12]}",
            expected[:12],
            "copy the checkpoint again, or use an earlier one",
        )
