"""Submitting: what is sent, and real jobs on a real head with token authentication."""

import json

import pytest
from tiny import RECIPE as TINY
from tiny import place_flags

from pipelines.recipe_file import RecipeError, load_recipe
from pipelines.submission import job_id, prepare


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a recipe in it, in which no output was ever written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(TINY.read_text())
    return tmp_path


def sent_recipe(command):
    """The recipe as the job will read it, in a folder of its own."""
    overrides = [value for flag, value in zip(command, command[1:], strict=False) if flag == "--set"]
    recipe = next(part for part in command if part.endswith(".toml"))
    return load_recipe(recipe, tuple(overrides))


@pytest.mark.parametrize(
    "command",
    [["run", "my.toml"], ["run", "--set", "train.steps=4", "my.toml"], ["train", "my.toml", "--set=train.steps=4"]],
)
def test_recipe_and_output_become_absolute(here, command):
    prepared, name = prepare(command)
    assert name == "tiny"
    assert prepared[0] == command[0]
    assert str(here / "my.toml") in prepared
    assert sent_recipe(prepared).output == str(here / "outputs" / "tiny")


def test_images_and_statistics_become_absolute_and_uris_stay(here):
    settings = ["images.path=pictures", "output=s3://bucket/run", "evaluate.reference=stats/r.npz"]
    flags = [part for setting in settings for part in ("--set", setting)]
    prepared, _ = prepare(["run", "my.toml", *flags])
    config = sent_recipe(prepared)
    assert config.images.path == str(here / "pictures")
    assert config.evaluate.reference == str(here / "stats" / "r.npz")
    assert config.output == "s3://bucket/run"


def test_digits_are_kept_even_beside_a_folder_of_that_name(here):
    (here / "digits").mkdir()
    prepared, _ = prepare(["run", "my.toml", "--set", "images.path=digits"])
    assert sent_recipe(prepared).images.path == "digits"


@pytest.mark.parametrize("autoencoder", ["stabilityai/sd-vae-ft-ema", "my/vae"])
def test_an_autoencoder_is_made_absolute_where_it_is_a_folder(here, autoencoder):
    (here / "my" / "vae").mkdir(parents=True)
    recipe = (here / "my.toml").read_text().partition("[autoencoder.train]")
    rest = recipe[2][recipe[2].index("[encode]") :]
    (here / "my.toml").write_text(f'{recipe[0]}[autoencoder]\nid = "{autoencoder}"\n{rest}')
    expected = str(here / autoencoder) if autoencoder.startswith("my/") else autoencoder
    assert sent_recipe(prepare(["run", "my.toml"])[0]).autoencoder.id == expected


def test_a_checkpoint_becomes_absolute_and_names_the_job(here):
    (here / "outputs" / "step_0000006").mkdir(parents=True)
    (here / "evaluate").mkdir()  # a folder named as the command is no path
    prepared, name = prepare(["evaluate", "outputs/step_0000006", "--num-samples", "20", "--force"])
    expected = ["evaluate", str(here / "outputs" / "step_0000006"), "--num-samples", "20", "--force"]
    assert (prepared, name) == (expected, "step_0000006")


def test_a_bad_recipe_is_refused_before_anything_is_sent(here):
    with pytest.raises(RecipeError, match="train.step"):
        prepare(["run", "my.toml", "--set", "train.step=4"])
    with pytest.raises(FileNotFoundError, match="no recipe at none.toml"):
        prepare(["run", "none.toml"])


def test_the_same_command_has_the_same_readable_id(here):
    def id_of(*command):
        prepared, name = prepare(list(command))
        return job_id(name, prepared)

    once = id_of("run", "my.toml")
    assert once.startswith("raydit-run-tiny-")
    assert once == id_of("run", "my.toml") == id_of("run", str(here / "my.toml"))
    assert once != id_of("run", "my.toml", "--set", "seed=1")
    assert once != id_of("train", "my.toml")
    assert id_of("run", "my.toml", "--set", "name=my cats/1").startswith("raydit-run-my-cats-1-")


def test_a_whole_run_works_as_a_job(submit, whole_run):
    assert whole_run.returncode == 0
    assert [stage for stage in ("autoencoder", "encode", "train", "evaluate") if stage in whole_run.stdout] == [
        "autoencoder",
        "encode",
        "train",
        "evaluate",
    ]
    (report,) = (submit.folder / "output" / "evaluations").glob("*/step_0000006/report.json")
    assert json.loads(report.read_text())["metrics"]
    assert "Traceback" not in whole_run.stdout + whole_run.stderr


def test_the_runs_of_a_job_carry_its_id_and_keep_their_files_here(submit, whole_run):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{submit.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.data.tags["raydit.stage"] for run in runs} >= {"pipeline", "encode", "train", "evaluate"}
    (submission_id,) = {run.data.tags["raydit.job_id"] for run in runs}
    assert submission_id.startswith("raydit-run-tiny-") and submission_id in whole_run.stdout
    (evaluation,) = [run for run in runs if run.data.tags["raydit.stage"] == "evaluate"]
    assert str(submit.folder) in evaluation.info.artifact_uri
    assert "report.json" in [file.path for file in client.list_artifacts(evaluation.info.run_id)]


@pytest.mark.slow
def test_submitted_again_it_is_a_new_job_that_only_skips(submit, whole_run):
    again = submit("run", str(TINY), *place_flags(submit.folder))
    assert again.returncode == 0
    assert again.stdout.count("finished already") == 4
    first = whole_run.stdout.split()[2]
    assert f"job {first}-2 at" in again.stdout


def test_a_failing_job_gives_its_exit_code(submit):
    failed = submit("encode", str(TINY), "--set", "images.path=nowhere", "--set", "output=failing")
    assert failed.returncode == 2
    assert "images.path: nothing at" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr


def test_a_wrong_token_is_one_clear_line(submit):
    refused = submit("run", str(TINY), RAY_AUTH_TOKEN="wrong")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.strip().splitlines()
    assert "another token (HTTP 403)" in line and "RAY_AUTH_TOKEN" in line
