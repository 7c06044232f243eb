"""docs/tutorial.md changes the demo's recipe into one that is valid, and shows the message of a mistake in it."""

import textwrap
import tomllib
from pathlib import Path

import pytest

from pipelines.config.reader import load_recipe
from raydit.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "pipelines" / "recipes" / "digits.toml"
PAGE = (ROOT / "docs" / "tutorial.md").read_text()


def blocks_after(text: str) -> list[str]:
    """Return the paragraphs of the page after a text, of which those of commands and files are indented."""
    assert text in PAGE
    return PAGE.partition(text)[2].split("\n\n")


def changed_lines() -> dict[str, object]:
    """Return the fields that the tutorial changes in the recipe, by dotted names."""
    first = blocks_after("change these lines")[1:]
    block = "\n".join(first[: next(k for k, text in enumerate(first) if not text.startswith("    "))])
    return flatten(tomllib.loads(textwrap.dedent(block)))


def flatten(content: dict[str, object], prefix: str = "") -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in content.items():
        fields |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def overrides() -> tuple[str, ...]:
    return tuple(f"{name}={value}" for name, value in changed_lines().items())


def test_the_recipe_of_the_tutorial_is_valid():
    config = load_recipe(RECIPE, overrides())
    assert (config.name, config.output, config.train.steps) == ("first", "outputs/first", 400)
    assert f"step_{config.train.steps:07d}" in PAGE


def test_every_changed_line_is_a_line_of_the_recipe():
    recipe = flatten(tomllib.loads(RECIPE.read_text()))
    assert changed_lines() and all(recipe[name] != value for name, value in changed_lines().items())


def test_the_mistake_is_refused_with_the_message_on_the_page():
    shown = blocks_after("raydit run first.toml --set train.validate_every=150")[1]
    with pytest.raises(InvalidInput) as refused:
        load_recipe(RECIPE, (*overrides(), "train.validate_every=150"))
    assert " ".join(shown.split()) == f"raydit: {refused.value}"
