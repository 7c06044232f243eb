"""What the command line does with the checkpoint that a recipe starts from."""

from pathlib import Path

from click.testing import CliRunner

from pipelines.cli.main import cli
from pipelines.cli.submission.paths import relative_recipe_paths
from pipelines.config.reader import load_recipe

RECIPE = Path(__file__).resolve().parents[3] / "pipelines" / "recipes" / "digits-5-9.toml"
START = "outputs/digits-0-4/checkpoints/step_0001200"


def test_a_dry_run_names_the_start_and_looks_for_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["train", str(RECIPE), "--dry-run"])
    assert result.exit_code == 0 and f" images from {START} (ema weights); reset labels, into" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_job_on_another_machine_is_told_of_a_start_on_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_recipe(RECIPE)
    assert "train.start.checkpoint" not in relative_recipe_paths(config)
    (tmp_path / START).mkdir(parents=True)
    assert relative_recipe_paths(config)["train.start.checkpoint"] == START
