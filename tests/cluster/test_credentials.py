"""Credentials are refused wherever they would be shown, and never shown in the refusal."""

import pytest
from tiny import RECIPE

from cluster.credentials import refuse_credentials
from pipelines.recipe_file import load_recipe


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter22@bucket/run",
        "http://user:hunter22@mlflow:5000",
        "postgresql+psycopg://mlflow:hunter22@db/mlflow",
    ],
)
def test_a_uri_with_a_password_is_refused_without_repeating_it(uri):
    with pytest.raises(ValueError, match="output: found a URI with a password in it, expected none") as refused:
        refuse_credentials({"output": f"run my.toml --set output={uri}"})
    assert "hunter22" not in str(refused.value)


@pytest.mark.parametrize("text", ["s3://bucket/a:b@c", "http://host:5000/a@b", "file:///folder/a:b@c", "a:b@c", ""])
def test_other_uris_are_fine(text):
    refuse_credentials({"output": text})


def test_the_value_of_a_secret_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    with pytest.raises(ValueError, match="the command: found the value of MLFLOW_TRACKING_PASSWORD") as refused:
        refuse_credentials({"the command": "run my.toml --set name='correct horse battery'"})
    assert "correct" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOKENIZER_NAME", "stabilityai"), ("RAY_AUTH_TOKEN_PATH", "/run/secrets/token"), ("HF_TOKEN", "short")],
)
def test_what_only_looks_like_a_secret_is_fine(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    refuse_credentials({"the command": f"run {value}"})


def test_a_recipe_with_a_password_is_refused_by_every_command(tmp_path):
    with pytest.raises(ValueError, match="--set output: found a URI with a password"):
        load_recipe(RECIPE, ("output=s3://key:hunter22@bucket/run",))
    recipe = tmp_path / "my.toml"
    recipe.write_text(RECIPE.read_text() + '\n[tracking]\nuri = "https://me:hunter22@mlflow"\n')
    with pytest.raises(ValueError, match="my.toml: found a URI with a password"):
        load_recipe(recipe)
