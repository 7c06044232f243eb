"""Match the names of files against untrusted shell patterns, in time that grows with the names' lengths."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from raydit.errors import InvalidInput

MAX_PATTERN_LENGTH = 1000
MAX_PATTERNS = 256
"""Patterns with wildcards; of names without any there may be as many as there are files."""
_TOKENS = re.compile(r"((?:\*\*/)+|\*\*|\*|\?|\[[^\]]+\])")


def match_any(patterns: Sequence[str], where: str) -> Callable[[str], bool]:
    """Return a function that says whether a path matches one of some patterns, in which ** stands for any folders.

    where: the patterns' file, for messages. Raises InvalidInput if they are too many, or one is too long or is none.
    """
    names = {pattern for pattern in patterns if not _TOKENS.search(pattern)}
    globs = [pattern for pattern in dict.fromkeys(patterns) if pattern not in names]
    wrong = next((pattern for pattern in globs if len(pattern) > MAX_PATTERN_LENGTH), None)
    if wrong is not None or len(globs) > MAX_PATTERNS:
        found = f"{len(globs):,} patterns" if wrong is None else f"the pattern {wrong[:100]}..."
        raise InvalidInput(
            f"{where}: found {found}",
            f"at most {MAX_PATTERNS} patterns of {MAX_PATTERN_LENGTH:,} letters",
            "correct the file, or set images.path to a folder of the files",
        )
    compiled = [_compile(glob, where) for glob in globs]
    return lambda name: name in names or any(_matches(glob, name) for glob in compiled)


class _Glob(NamedTuple):
    prefix: str
    """What precedes the first wildcard."""
    suffix: str
    """What follows the last one."""
    tokens: list[str | re.Pattern[str]]
    """The rest: wildcards, literal text, and expressions for sets of letters."""


def _compile(pattern: str, where: str) -> _Glob:
    # Repeated **/ mean the same as one; what is split by a group has wildcards at odd positions.
    parts = ["**/" if part.startswith("**/") else part for part in _TOKENS.split(pattern)]
    try:
        middle = [re.compile(part) if index % 2 and part.startswith("[") else part for index, part in enumerate(parts)]
    except re.error as error:
        raise InvalidInput(
            f"{where}: found the pattern {pattern!r} ({error})", "a shell pattern", "correct the file"
        ) from error
    tokens = [_Wildcard(part) if index % 2 and isinstance(part, str) else part for index, part in enumerate(middle)]
    return _Glob(parts[0], parts[-1], [token for token in tokens[1:-1] if token != ""])


class _Wildcard(str):
    """A wildcard, one of **/, **, * and ?. Its type distinguishes it from literal text."""


def _matches(glob: _Glob, name: str) -> bool:
    """Follow all positions at which a match can be after each token, instead of trying one after the other."""
    end = len(name) - len(glob.suffix)
    if end < len(glob.prefix) or not (name.startswith(glob.prefix) and name.endswith(glob.suffix)):
        return False
    reached = {len(glob.prefix)}
    for token in glob.tokens:
        if isinstance(token, re.Pattern):
            reached = {at + 1 for at in reached if at < end and token.fullmatch(name, at, at + 1)}
        elif not isinstance(token, _Wildcard):
            reached = {at + len(token) for at in reached if name.startswith(token, at, end)}
        elif token == "?":
            reached = {at + 1 for at in reached if at < end and name[at] != "/"}
        elif token == "*":
            reached = _up_to_slashes(reached, name, end)
        elif reached:
            first = min(reached)
            further = range(first, end + 1)
            reached = set(further) if token == "**" else reached | {at for at in further[1:] if name[at - 1] == "/"}
        if not reached:
            return False
    return end in reached


def _up_to_slashes(reached: set[int], name: str, end: int) -> set[int]:
    """Return the positions from those reached up to the next slash after each."""
    found: set[int] = set()
    for at in sorted(reached):
        if at not in found:
            slash = name.find("/", at, end)
            found.update(range(at, (end if slash < 0 else slash) + 1))
    return found
