"""Refuse numbers in reports that are not finite: raydit writes none, and JSON has none."""

import math
from collections.abc import Iterator
from typing import Any

from raydit.errors import InvalidInput


def refuse_nonfinite(content: Any, name: str, do: str = "evaluate the checkpoint again") -> None:
    """Raise InvalidInput for NaN or infinity in the parsed content of a JSON file, which Python's parser accepts.

    name: of the file, and do: what to do about it, for the message.
    """
    for field, number in _floats(content, ""):
        if not math.isfinite(number):
            where = f" in {field[1:100]}" if field else ""
            raise InvalidInput(f"{name}: found {number}{where}", "finite numbers", do)


def _floats(value: Any, field: str) -> Iterator[tuple[str, float]]:
    """Yield the floating-point numbers in parsed JSON, each with the keys and positions that lead to it."""
    if isinstance(value, float):
        yield field, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _floats(each, f"{field}.{key}")
    elif isinstance(value, list):
        for position, each in enumerate(value):
            yield from _floats(each, f"{field}.{position}")
