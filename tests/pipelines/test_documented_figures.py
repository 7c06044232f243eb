"""The README's figures are those that the benchmarks and studies wrote."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
RULES = ("| ---", "| Benchmark |")


def figures(readme: str) -> list[str]:
    """Lines of the tables below "Measured"."""
    section = readme.partition("\n## Measured\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|") and not line.startswith(RULES)]


def not_written(readme: str) -> list[str]:
    written = {line for path in RESULTS.glob("*.md") for line in path.read_text().splitlines()}
    return [line for line in figures(readme) if line not in written]


def test_every_figure_was_written_by_a_benchmark():
    readme = (ROOT / "README.md").read_text()
    assert len(figures(readme)) > 5
    assert not_written(readme) == [], "copy the lines anew from tests/benchmarks/results"


def test_a_figure_that_was_touched_is_noticed():
    readme = (ROOT / "README.md").read_text()
    for line in figures(readme):
        touched = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), line)
        assert not_written(readme.replace(line, touched)) == [touched]
