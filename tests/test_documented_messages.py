"""docs/troubleshooting.md quotes messages as the source has them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PACKAGES = ("raydit", "dit", "evaluation", "cluster", "pipelines")
FIXED_PART = re.compile(r"\.\.\.|, expected ")
"""What separates the fixed parts of a quotation: "..." stands for values, and ", expected " comes from RayditError."""
QUOTED = [
    *re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE),
    *("took over the folder from ...", "workers died ... times without a new checkpoint in between"),
    "... has not taken everything yet: ...",
]
"""Headings, and messages within the text."""


def texts_by_scope() -> Iterator[str]:
    """Yield the strings of each function, method and statement of the source, joined."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                for scope in node.body if isinstance(node, ast.ClassDef) else [node]:
                    strings = (each.value for each in ast.walk(scope) if isinstance(each, ast.Constant))
                    yield "\n".join(text for text in strings if isinstance(text, str))


def is_quoted(message: str, texts: list[str]) -> bool:
    """Whether all fixed parts of a message stand in the strings of one function."""
    parts = [part.strip() for part in FIXED_PART.split(message)]
    return any(all(part in text for part in parts) for text in texts)


@pytest.fixture(scope="module")
def texts():
    return list(texts_by_scope())


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_those_of_the_source(message, texts):
    assert message in PAGE and max(map(len, FIXED_PART.split(message))) > 8
    assert is_quoted(message, texts)


def test_a_message_that_has_changed_is_noticed(texts):
    assert is_quoted("... is in use by ...", texts)
    assert not is_quoted("... is being used by ...", texts)
    assert not is_quoted("images.path: found nothing at ..., expected one of the folders", texts)


def test_links_lead_to_files():
    for page in (ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
