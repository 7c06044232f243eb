"""Parse TOML that anybody may have written, in bounded time and depth; and write a value as TOML."""

import json
import re
import tomllib
from typing import Any

MAX_RECIPE_BYTES = 2**20
"""Longest recipe; one that names 20,000 classes has half of that."""
MAX_KEY_PARTS = 32
"""Most parts of a dotted key: tomllib takes time with the square of their number. A recipe's have four."""
_LONG_KEY = re.compile(
    r"""^[ \t\[]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){%d}""" % MAX_KEY_PARTS,  # noqa: UP031
    re.MULTILINE,
)


class TomlError(ValueError):
    """Raised for a text that is no TOML, or that no recipe needs."""


def parse_toml(text: str) -> dict[str, Any]:
    """Return the content of a TOML text. Raises TomlError."""
    if match := _LONG_KEY.search(text):
        raise TomlError(f"a key of more than {MAX_KEY_PARTS} parts (at line {text.count(chr(10), 0, match.end()) + 1})")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise TomlError("nested too deeply") from None
    except ValueError as error:  # tomllib's own error, or Python's for a number of more than 4,300 digits
        raise TomlError(str(error)) from None


def toml_value(value: str | list[str]) -> str:
    """Return a text, or a list of texts, as TOML.

    It is their JSON, in which only two things are written differently: TOML has no halves of surrogate pairs, and takes
    no U+007F as it is.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
