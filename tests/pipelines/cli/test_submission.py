"""Submitting: what is sent, and real jobs on a real head with token authentication."""

import json
import os
import time

import pytest
from tiny import RECIPE as TINY
from tiny import place_flags
from tiny_run import ROOT

from cluster import jobs, storage
from cluster.storage.lease import hold_folder
from pipelines.cli.main import cli
from pipelines.cli.submission import prepare
from pipelines.cli.submission import submit as submission
from pipelines.cli.submission.command_line import CommandLine
from pipelines.config.reader import RecipeError
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.tracking.provenance import code_tags
from pipelines.tracking.store import tracking_uri
from raydit.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray passes it to aiohttp


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a recipe in it, in which no output was ever written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(TINY.read_text())
    return tmp_path


def line(*texts):
    return CommandLine.read(cli, list(texts))


def prepared(*command):
    return prepare.prepare_local(line(*command))


def packed(command, folder, **flags):
    return prepare.prepare_remote(line(*command), folder, **flags)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["run", "my.toml", "--set", "images.path=pictures"], "tiny"),
        (["plan", "--cluster", "8xH100", "my.toml"], "tiny"),
        (["evaluate", "--num-samples", "20", "outputs/step_0000006", "--recipe=my.toml"], "step_0000006"),
        (["evaluate", "s3://bucket/step_0000006", "--set", "output=outputs/other"], "step_0000006"),
        (["sample", "s3://bucket/step_1", "--npz", "samples.npz"], "step_1"),
    ],
)
def test_a_job_on_this_machine_starts_in_this_folder_with_the_command_as_it_is(here, command, name):
    ready = prepared(*command)
    assert (ready.command, ready.folder, ready.name) == (command, str(here), name)
    assert ready.recipe == (TINY.read_text() if "my.toml" in command[1] + command[-1] else "")


@pytest.mark.parametrize("command", [["sample", "s3://b/step_1", "--npz", "samples.npz"], ["verify", "s3://b/card"]])
def test_commands_in_two_folders_are_two_jobs(here, monkeypatch, command):
    once = prepared(*command).job_id
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    assert prepared(*command).job_id != once


def test_the_outputs_of_a_job_are_refused_in_the_folder_that_ray_deletes(tmp_path, monkeypatch):
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for write in (
        lambda: hold_folder("outputs/tiny", on_lost=print).__enter__(),
        lambda: storage.refuse_unwritable("grid.png"),
        lambda: SavedSamples("saved").refuse_other_samples({}),
        lambda: storage.refuse_job_folder(folder.as_uri()),
    ):
        with pytest.raises(InvalidInput, match="in a folder that Ray deletes after the job.*Use a URI"):
            write()
    assert list(folder.iterdir()) == []
    storage.refuse_job_folder(str(tmp_path))
    storage.refuse_job_folder("s3://bucket/_ray_pkg_0123")


def test_a_bad_recipe_is_refused_before_anything_is_sent(here):
    with pytest.raises(RecipeError, match="train.step"):
        prepared("run", "my.toml", "--set", "train.step=4")
    with pytest.raises(FileNotFoundError, match="no recipe at none.toml"):
        prepared("run", "none.toml")


def test_the_same_command_has_the_same_readable_id(here):
    def id_of(*command):
        return prepared(*command).job_id

    once = id_of("run", "my.toml")
    assert once.startswith("raydit-run-tiny-")
    assert once == id_of("run", "my.toml")
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
    assert again.stdout.count("already finished") == 4
    first = whole_run.stdout.split()[2]
    assert f"job {first}-2 at" in again.stdout


@pytest.mark.slow
def test_a_failing_job_gives_its_exit_code(submit):
    failed = submit("encode", str(TINY), "--set", "images.path=nowhere", "--set", "output=failing")
    assert failed.returncode == 2
    assert "images.path: found nothing at" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr


def test_a_wrong_token_is_one_clear_line(submit):
    refused = submit("run", str(TINY), RAY_AUTH_TOKEN="wrong")
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.strip().splitlines()
    assert "another token (HTTP 403)" in line and "RAY_AUTH_TOKEN" in line


@pytest.fixture
def project(here):
    """A working directory with data, an output and a secret file beside the recipe."""
    for name in ("data/cats/1.png", "outputs/tiny/plan.json", "lib/reference.npz", "lib/code.py", ".env"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    return here


REMOTE = ["--set", "output=s3://bucket/run", "--set", "images.path=digits"]


def test_for_another_machine_the_working_directory_goes_along_without_data(project):
    ready = packed(["run", "my.toml", *REMOTE, "--set", "evaluate.reference=lib/reference.npz"], project)
    assert set(ready.package.files) == {"my.toml", "lib/reference.npz", "lib/code.py"}
    assert ready.command[:2] == ["run", "my.toml"]
    assert ready.name == "tiny" and ready.job_id.startswith("raydit-run-tiny-")


def test_a_recipe_from_elsewhere_goes_along_too(project):
    ready = packed(["run", str(TINY), *REMOTE], project)
    assert ready.command[:2] == ["run", "submitted/tiny.toml"]
    assert ready.package.files["submitted/tiny.toml"] == TINY


def test_a_recipe_of_a_parent_folder_goes_along_too(project):
    (project / "lib" / "deep").mkdir()
    os.chdir(project / "lib" / "deep")
    ready = packed(["run", "../../my.toml", *REMOTE], project / "lib" / "deep")
    assert ready.command[:2] == ["run", "submitted/my.toml"]
    assert ready.package.files["submitted/my.toml"] == project / "my.toml"
    os.chdir(project)
    assert packed(["run", "lib/deep/../../my.toml", *REMOTE], project).command[:2] == ["run", "my.toml"]


def test_the_commit_of_sent_code_goes_along(project, monkeypatch):
    commit = code_tags(ROOT)["mlflow.source.git.commit"]
    assert "RAYDIT_COMMIT" not in packed(["run", "my.toml", *REMOTE], project).env
    sent = packed(["run", "my.toml", *REMOTE], project, install=True).env
    assert sent["RAYDIT_COMMIT"] == commit and sent["RAYDIT_CODE_DIRTY"] in ("true", "false")
    for name, value in sent.items():
        monkeypatch.setenv(name, value)
    code_tags.cache_clear()
    unpacked = code_tags(project)
    assert unpacked == {"mlflow.source.git.commit": commit, "raydit.code_dirty": sent["RAYDIT_CODE_DIRTY"]}


def test_a_database_of_this_folder_is_found_by_a_job_here_and_refused_for_another_machine(here):
    relative = ["--set", "tracking.uri=sqlite:///runs.db"]
    assert prepared("run", "my.toml", *relative).tracking == f"sqlite:///{here / 'runs.db'}"
    with pytest.raises(InvalidInput, match="tracking.uri: found 'sqlite:///runs.db', a path on this machine"):
        packed(["run", "my.toml", *REMOTE, *relative], here)
    packed(["run", "my.toml", *REMOTE, "--set", "tracking.uri=sqlite:////mnt/shared/runs.db"], here)


def test_a_job_is_refused_a_database_in_the_folder_that_ray_deletes(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in ("", "sqlite:///mlflow.db", f"sqlite:///{folder}/mlflow.db"):
        with pytest.raises(InvalidInput, match="in a folder that Ray deletes.*Set MLFLOW_TRACKING_URI to a server"):
            tracking_uri(uri)
    assert tracking_uri("http://mlflow:5000") == "http://mlflow:5000"
    assert tracking_uri(f"sqlite:///{tmp_path}/mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.slow
def test_a_packed_job_without_a_store_that_lasts_is_refused(submit, project):
    settings = ("--set", "images.path=digits", "--set", f"output={project / 'out'}")
    refused = submit("run", "my.toml", *settings, flags=("--pack",), folder=project)
    assert refused.returncode == 2
    assert "tracking is not set here" in refused.stdout
    assert "in a folder that Ray deletes after the job" in refused.stdout.splitlines()[-1]
    assert not (project / "out" / "latents").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "my.toml"], "output: found 'outputs/tiny', a path on this machine"),
        (["run", "my.toml", *REMOTE, "--set", "images.path=data/cats"], "images.path: found 'data/cats', a path"),
        (["evaluate", "outputs/tiny"], "evaluate: found 'outputs/tiny', a path on this machine"),
    ],
)
def test_what_only_this_machine_has_is_refused_before_anything_is_sent(project, command, message):
    with pytest.raises(ValueError, match=message) as refused:
        packed(command, project)
    assert "expected a URI (s3://BUCKET/...) or the absolute path of a mount" in str(refused.value)


def test_absolute_paths_and_uris_are_taken_for_shared_ones(project):
    mounts = ["--set", "output=/mnt/shared/run", "--set", "images.path=gs://bucket/images"]
    assert packed(["train", "my.toml", *mounts], project).command == ["train", "my.toml", *mounts]
    assert packed(["evaluate", "runs:/0123"], project).command == ["evaluate", "runs:/0123"]


def test_settings_go_along_unless_only_this_machine_reaches_them_and_credentials_never(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    ready = packed(["run", "my.toml", *REMOTE], project)
    assert ready.env == {"MLFLOW_TRACKING_URI": "https://mlflow.example.com", "AWS_REGION": "eu-west-1"}
    assert ready.tracking == "https://mlflow.example.com"
    assert "AWS_ENDPOINT_URL: not sent, because only this machine" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////home/me/mlflow.db")
    assert "MLFLOW_TRACKING_URI" not in packed(["run", "my.toml", *REMOTE], project).env
    here = prepared("run", "my.toml")  # on this machine all of it is reached
    assert here.env["MLFLOW_TRACKING_URI"] == "sqlite:////home/me/mlflow.db"
    assert here.env["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000"


def test_the_id_of_a_job_is_that_of_its_recipe_and_code(project):
    def remote():
        return packed(["run", "my.toml", *REMOTE], project).job_id

    def local():
        return prepared("run", "my.toml").job_id

    before = remote(), local()
    (project / "data" / "cats" / "2.png").touch()
    assert (remote(), local()) == before
    (project / "lib" / "code.py").write_text("changed")
    assert remote() != before[0] and local() == before[1]
    (project / "my.toml").write_text((project / "my.toml").read_text() + "\n# changed")
    assert local() != before[1]


def test_for_a_plain_cluster_raydit_goes_along_with_pinned_requirements(project):
    ready = packed(["run", "my.toml", *REMOTE], project, install=True)
    sent = set(ready.package.files)
    assert {"pipelines/cli/main.py", "dit/model.py", "evaluation/metrics.py", "cluster/jobs.py"} <= sent
    assert any(line.startswith("torch==") for line in ready.pip)
    assert ready.job_id != packed(["run", "my.toml", *REMOTE], project).job_id


@pytest.mark.parametrize(
    ("address", "sent_along"),
    [("http://127.0.0.1:8265", False), ("http://localhost:1", False), ("http://[::1]:8265", False)]
    + [("http://head:8265", True), ("https://10.0.0.7", True), ("http://127.example.com:8265", True)],
)
def test_the_working_directory_is_sent_to_other_machines_only(project, address, sent_along, monkeypatch):
    started = []
    monkeypatch.setattr(submission, "start", lambda ready, where: started.append(ready) or ("id", False))
    submission.submit_command(line("run", "my.toml", *REMOTE), address=address, wait=False, pack=None, pip=False)
    assert (started[0].package is not None) == sent_along


FAKE_RAYDIT = """
import os, sys, time
from pathlib import Path
print("sent:", sorted(str(p) for p in Path(".").rglob("*") if p.is_file() and "__pycache__" not in str(p)))
print("region:", os.environ.get("AWS_REGION"), "arguments:", sys.argv[1:], flush=True)
time.sleep(600)
"""


def test_a_packed_job_runs_what_was_sent_is_joined_left_and_ended_and_holds_no_credentials(
    ray_head, project, monkeypatch, capsys
):
    """Through a forwarded port, as to a cluster elsewhere: one job, as each takes seconds."""
    planted = {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG", "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery"}
    for name, value in {**ray_head.env, **planted, "AWS_REGION": "eu-west-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.invalid")
    (project / ".env").write_text("\n".join(planted.values()))
    (project / "pipelines").mkdir()
    (project / "pipelines" / "__init__.py").touch()
    (project / "pipelines" / "cli.py").write_text(FAKE_RAYDIT)  # the code that was sent, not what is installed there

    def submit(wait):
        command = line("train", "my.toml", *REMOTE)
        return submission.submit_command(command, address=ray_head.address, wait=wait, pack=True, pip=False)

    assert submit(wait=False) == 0
    job_id = capsys.readouterr().out.split()[2]
    wait_for(lambda: "region" in jobs.read_log(job_id, ray_head.address))

    def interrupted(line):
        if line.startswith("sent:"):
            raise KeyboardInterrupt

    monkeypatch.setattr(submission.click, "echo", interrupted)
    assert submit(wait=True) == 130
    said = capsys.readouterr().out
    assert f"job {job_id} at {ray_head.address} (already running)" in said
    assert f"detached; job {job_id} continues. Follow its log again: raydit jobs logs -f {job_id} --address" in said
    assert jobs.get_job(job_id, ray_head.address).status == "RUNNING"

    assert jobs.stop(job_id, ray_head.address)
    wait_for(lambda: jobs.get_job(job_id, ray_head.address).has_ended)
    log = jobs.read_log(job_id, ray_head.address)
    assert "sent: ['lib/code.py', 'lib/reference.npz', 'my.toml', 'pipelines/__init__.py', 'pipelines/cli.py']" in log
    assert f"region: eu-west-1 arguments: {['train', 'my.toml', *REMOTE]}" in log
    shown = repr([vars(details) for details in jobs._client(ray_head.address).list_jobs()]) + log
    assert job_id in shown and "https://mlflow.invalid" in shown
    assert not [name for name, value in {**planted, "RAY_AUTH_TOKEN": ray_head.token}.items() if value in shown]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
