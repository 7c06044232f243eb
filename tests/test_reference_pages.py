"""The generated reference pages say what the code says."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_those_that_the_code_gives(name):
    assert (DOCS / "reference" / name).read_text() == PAGES[name](), "run `make docs`"


def test_every_field_has_a_description():
    rows = [line for line in PAGES["recipe.md"]().splitlines() if line.startswith("| `")]
    assert len(rows) > 120
    assert not [row for row in rows if not row.split(" | ")[-1].rstrip(" |")]
