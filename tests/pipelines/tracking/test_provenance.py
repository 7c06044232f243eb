"""Every run says what it is, how to do it again, and by which code and recipe."""

import subprocess
import sys

import pytest
from mlflow import MlflowClient
from tiny import tiny_recipe

from pipelines.config.reader import load_recipe, resolved
from pipelines.tracking.experiment_page import experiment_description
from pipelines.tracking.provenance import code_tags, recipe_artifact, run_description, toml_of

RECIPES = ("tests/recipes/tiny.toml", "pipelines/recipes/digits.toml")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_of_a_run_is_the_same_recipe_again(request, recipe, tmp_path):
    overrides = ("evaluate.cfg_scale=1.5", "evaluate.cfg_interval=[0.1,0.8]", 'name="a \\"b\\" \\u00e9"')
    overrides += ('train.label_selector={"ray.io/market-type" = "!spot"}', "train.ema_sigma_rels=[0.05,0.1]")
    config = load_recipe(request.config.rootpath / recipe, overrides)
    path = recipe_artifact(config, tmp_path)
    assert path.name == "recipe.toml" and load_recipe(path) == config
    assert recipe_artifact(config, tmp_path) == path


def test_toml_says_what_a_dictionary_does():
    import tomllib

    content = {"a": 1, "b": {"c": 1e-5, "d": {"e": True}, "f": [[1, 2], []]}, "g": [{"h": "x"}], "i": {}}
    assert tomllib.loads(toml_of(content)) == content
    assert tomllib.loads(toml_of({"a": None, "b": {"c": None}})) == {"b": {}}


def test_the_code_is_named_by_its_commit_and_whether_it_was_changed(tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code_tags.cache_clear()
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert code_tags(tmp_path) == {"mlflow.source.git.commit": commit, "raydit.code_dirty": "false"}
    (tmp_path / "file").write_text("2")
    code_tags.cache_clear()
    assert code_tags(tmp_path)["raydit.code_dirty"] == "true"
    (tmp_path / "below").mkdir()
    assert code_tags(tmp_path / "below") == {}  # installed into a folder of somebody else's project


def test_a_description_tells_the_command_and_how_to_do_it_again(tmp_path, monkeypatch):
    config = tiny_recipe(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/raydit", "evaluate", "a checkpoint", "--num-samples", "16"])
    text = run_description(config, "evaluate", {"raydit.checkpoint": "/c/step_2"})
    assert "Called as `raydit evaluate 'a checkpoint' --num-samples 16`" in text
    assert "\n    raydit evaluate /c/step_2 --recipe recipe.toml\n" in text
    assert "`raydit lineage /c/step_2`" in text
    monkeypatch.setattr(sys, "argv", ["/bin/raydit", "run", "a.toml", "--set", "tracking.uri=https://me:secret@host"])
    text = run_description(config, "pipeline", {})
    assert "secret" not in text and "tracking.uri=https://...@host" in text
    text = run_description(config, "evaluate", {"raydit.checkpoint": "/my runs/step_2"})
    assert "\n    raydit evaluate '/my runs/step_2' --recipe recipe.toml\n" in text
    assert "`raydit lineage '/my runs/step_2'`" in text
    assert "`raydit runs best 'my runs'`" in experiment_description("my runs")
    monkeypatch.setattr(sys, "argv", ["/bin/ipython"])
    text = run_description(config, "pipeline", {})
    assert "Called as" not in text and "\n    raydit run recipe.toml\n" in text


def test_all_runs_of_a_pipeline_carry_description_versions_hardware_and_recipe(story):
    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment])
    assert {run.data.tags["raydit.stage"] for run in runs} == {"pipeline", "encode", "train", "evaluate"}
    for run in runs:
        tags = run.data.tags
        assert f"**{tags['raydit.stage']}** of the recipe `tiny`" in tags["mlflow.note.content"]
        assert tags["raydit.version.python"] == ".".join(map(str, sys.version_info[:3]))
        assert "CPU cores" in tags["raydit.hardware"] and "raydit.version.torch" in tags
        assert "recipe.toml" in [file.path for file in client.list_artifacts(run.info.run_id)]
    (train,) = client.search_runs([experiment], "tags.`raydit.stage` = 'train'")
    path = client.download_artifacts(train.info.run_id, "recipe.toml")
    assert resolved(load_recipe(path)) == resolved(story.config)
