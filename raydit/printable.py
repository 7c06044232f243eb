"""Text from others, made safe to show: names and messages must not move a terminal's cursor or forge a line."""

import re

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Control characters, those that turn the direction of writing, and line separators; not the tab and the line feed."""


def printable(text: str) -> str:
    """Return a text with escapes such as \\x1b instead of control characters. Line feeds and tabs stay."""
    return _INVISIBLE.sub(_escape, text)


def one_line(text: str) -> str:
    """Return a text as one printable line: line feeds are escaped too."""
    return printable(text).replace("\n", "\\n")


def message_of(error: BaseException) -> str:
    """Return an error's message on one line, with single spaces."""
    return " ".join(str(error).split())


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
