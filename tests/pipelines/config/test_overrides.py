"""Overrides by themselves: which tracking store they name, and mistakes in them."""

import re

import pytest
from tiny import RECIPE as TINY

from pipelines.checkpoints.importing import import_settings
from pipelines.config.overrides import given_tracking_uri, read_overrides
from pipelines.config.reader import RecipeError
from pipelines.config.toml_text import toml_value
from pipelines.scoring.protocols.build_protocol import _reference_settings
from raydit.errors import NotFound


@pytest.fixture
def recipe(tmp_path):
    """Path of a recipe with a tracking store of its own."""
    file = tmp_path / "my.toml"
    file.write_text(f'{TINY.read_text()}\n[tracking]\nuri = "sqlite:///recipe.db"\n')
    return str(file)


@pytest.mark.parametrize(
    ("overrides", "uri"),
    [
        ([], ""),
        (["train.steps=4"], ""),
        (["tracking.uri=sqlite:///given.db"], "sqlite:///given.db"),
        (['tracking.uri="http://mlflow:5000"', "seed=1"], "http://mlflow:5000"),
        (['tracking = { uri = "sqlite:///given.db" }'], "sqlite:///given.db"),
    ],
)
def test_the_store_is_that_of_the_overrides_and_else_that_of_the_recipe(recipe, overrides, uri):
    assert given_tracking_uri(overrides) == uri
    assert given_tracking_uri(overrides, recipe) == (uri or "sqlite:///recipe.db")
    assert given_tracking_uri(overrides, str(TINY)) == uri


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracking=http://mlflow:5000", "--set tracking: found 'http://mlflow:5000', expected a section. Set a field"),
        ("trackng.uri=sqlite:///x.db", '--set trackng.uri: unknown key (did you mean "tracking"?), expected one of'),
        ("tracking.url=sqlite:///x.db", '--set tracking.url: unknown key (did you mean "tracking.uri"?)'),
        ("tracking.uri=5", "--set tracking.uri: found 5 (int), expected a string. Change uri"),
        ("tracking.uri", "--set tracking.uri: found no key and value, expected KEY=VALUE"),
    ],
)
def test_a_mistake_in_the_store_is_one_line(recipe, override, message):
    for path in (None, recipe):
        with pytest.raises(RecipeError, match=f"^{re.escape(message)}[^\n]*$"):
            given_tracking_uri([override], path)


def test_a_value_in_place_of_a_section_is_refused_wherever_overrides_are_read():
    for read in (read_overrides, _reference_settings, lambda overrides: import_settings(overrides, pipeline=True)):
        with pytest.raises(
            RecipeError, match=r"^--set autoencoder: found 'x', expected a section. .* autoencoder\.id$"
        ):
            read(("evaluate.reference=r.npz", "autoencoder=x"))
    with pytest.raises(RecipeError, match="^--set evaluate: found 5, expected a section"):
        _reference_settings(("evaluate=5",))


@pytest.mark.parametrize("value", ["r\U0001f600.npz", 'a "quoted" \\ name', "tab\tand\x7f", ["timm:x", "\u00e9"]])
def test_what_options_write_as_toml_is_read_as_it_was(value):
    assert read_overrides([f"evaluate.reference={toml_value(value)}"]) == {"evaluate": {"reference": value}}


@pytest.mark.parametrize("command", ["evaluate", "sample", "tune"])
def test_a_run_is_looked_for_in_the_store_of_the_command(raydit, recipe, monkeypatch, command):
    asked = []

    def find_checkpoint(uri, name):
        asked.append(uri)
        raise NotFound(f"found no {name}", "", "")

    monkeypatch.setattr("pipelines.tracking.lookup.find_checkpoint", find_checkpoint)
    for flags in (["--recipe", recipe], ["--recipe", recipe, "--set", 'tracking.uri="sqlite:///given.db"'], []):
        code, _, err = raydit(command, "runs:/0123", *flags)
        assert (code, err.strip()) == (2, "raydit: found no runs:/0123")
    assert asked == ["sqlite:///recipe.db", "sqlite:///given.db", ""]
