"""Credentials are refused wherever they would be shown, and error messages do not repeat them."""

from dataclasses import replace

import pytest
from tiny import RECIPE

from cluster import storage
from cluster.credentials import protect_token_file, refuse_credentials
from cluster.doctor import check_token_file
from pipelines.config.reader import apply_override, load_recipe
from pipelines.tracking.store import tracking_uri

PASSWORD = "s3://key:hunter22@bucket/run"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter22@bucket/run",
        "http://user:hunter22@mlflow:5000",
        "postgresql+psycopg://mlflow:hunter22@db/mlflow",
        "https://hunter22@mlflow.example.com",
        "s3://AKIAEXAMPLE:hunt/hunter22@bucket/run",
        "https://account.blob.core.windows.net/runs?sv=2024&sig=hunter22",
        "https://mlflow/api?access_token=hunter22",
        "s3://bucket/run?X-Amz-Signature=hunter22",
        "https://host/#access_token=hunter22",
    ],
)
def test_a_uri_with_a_password_is_refused_without_repeating_it(uri):
    with pytest.raises(ValueError, match="output: found a URI with a password in it, expected none") as refused:
        refuse_credentials({"output": f"run my.toml --set output={uri}"})
    assert "hunter22" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a:b@c",
        "http://host:5000/a@b",
        "file:///folder/a:b@c",
        "a:b@c",
        "",
        "postgresql://mlflow@db/x",
        "s3://b/k?region=eu&scheme=http",
    ],
)
def test_other_uris_are_fine(text):
    refuse_credentials({"output": text})


def test_a_text_of_any_length_is_searched_in_linear_time():
    """With a pattern that starts again at each letter these took minutes."""
    for text in ("a" * 2_000_000, "a://" * 200_000, "a:" * 500_000 + "//", ("a" * 19 + "://") * 50_000):
        refuse_credentials({"output": text})


@pytest.mark.parametrize("name", ["PGPASSWORD", "AZURE_STORAGE_CONNECTION_STRING", "MYAPIKEY", "REDIS_PASSPHRASE"])
def test_usual_names_of_secret_variables_are_known(name, monkeypatch):
    monkeypatch.setenv(name, "correct horse")
    with pytest.raises(ValueError, match=f"found the value of {name}"):
        refuse_credentials({"output": "correct horse"})


def test_the_value_of_a_secret_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    with pytest.raises(ValueError, match="the command: found the value of MLFLOW_TRACKING_PASSWORD") as refused:
        refuse_credentials({"the command": "run my.toml --set name='correct horse battery'"})
    assert "correct" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOKENIZER_NAME", "stabilityai"), ("RAY_AUTH_TOKEN_PATH", "/run/secrets/token"), ("HF_TOKEN", "short")],
)
def test_a_value_that_only_looks_like_a_secret_is_fine(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    refuse_credentials({"the command": f"run {value}"})


def test_rays_token_file_is_made_and_kept_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_token_file().ok
    protect_token_file()
    file = tmp_path / ".ray" / "auth_token"
    token = file.read_text()
    assert (file.stat().st_mode & 0o777, len(token)) == (0o600, 64) and check_token_file().ok
    file.chmod(0o644)  # as Ray makes it
    check = check_token_file()
    assert not check.ok and "has mode 0644" in check.found and check.do == f"chmod 600 {file}"
    protect_token_file()
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, token)


def test_a_recipe_with_a_password_is_refused_by_every_command(tmp_path):
    with pytest.raises(ValueError, match="--set output: found a URI with a password"):
        load_recipe(RECIPE, ("output=s3://key:hunter22@bucket/run",))
    recipe = tmp_path / "my.toml"
    recipe.write_text(RECIPE.read_text() + '\n[tracking]\nuri = "https://me:hunter22@mlflow"\n')
    with pytest.raises(ValueError, match="my.toml: found a URI with a password"):
        load_recipe(recipe)


@pytest.mark.parametrize("key", ["output", "images.path", "encode.output", "evaluate.reference", "tracking.uri"])
def test_a_recipe_built_in_python_takes_no_password_either(key):
    recipe = load_recipe(RECIPE)
    *sections, name = key.split(".")
    for section in sections:
        changed = {section: replace(getattr(recipe, section), **{name: PASSWORD})}
    with pytest.raises(ValueError, match=rf"^{key}: found a URI with a password") as refused:
        replace(recipe, **(changed if sections else {name: PASSWORD}))
    assert "hunter22" not in str(refused.value)


def test_overrides_of_a_checkpoints_recipe_are_checked_before_they_are_shown():
    for override, flag in ((f"output={PASSWORD}", "--set output"), (PASSWORD, "--set ...")):
        with pytest.raises(ValueError, match=rf"^{flag}: found a URI with a password") as refused:
            apply_override({}, override)
        assert "hunter22" not in str(refused.value)


def test_nothing_is_read_or_written_at_a_uri_with_a_password():
    for use in (
        storage.exists,
        storage.read_bytes,
        storage.list_files,
        lambda path: storage.write_atomically(path, b""),
    ):
        with pytest.raises(ValueError, match="^path: found a URI with a password") as refused:
            use(PASSWORD)
        assert "hunter22" not in str(refused.value)


def test_a_tracking_uri_with_a_password_is_refused_and_its_variables_are_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter22@mlflow")
    for uri in ("", "postgresql://me:hunter22@db/mlflow"):
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refused:
            tracking_uri(uri)
        assert "hunter22" not in str(refused.value)
    assert tracking_uri("https://mlflow") == "https://mlflow"
