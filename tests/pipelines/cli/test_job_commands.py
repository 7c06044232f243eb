"""`raydit jobs` on a job of a real head, and what it says of the job's MLflow runs."""

import json
import shutil
import sys

import pytest
from mlflow_server import answering

from cluster import jobs
from cluster.jobs import Job
from pipelines.cli import main as cli
from pipelines.cli.commands import jobs as job_commands
from pipelines.cli.commands.jobs import find_runs
from pipelines.tracking.lookup import runs_of_job

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray passes it to aiohttp


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database):
    """A store with two runs of the job "job-1", one of another, and one of a third in another experiment."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path_factory.mktemp('store'))}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("tiny")
    for start, (stage, job) in enumerate([("encode", "job-1"), ("train", "job-1"), ("train", "job-2")], 1):
        tags = {"raydit.stage": stage, "raydit.job_id": job}
        client.create_run(experiment, start_time=start, tags=tags)
    other = client.create_experiment("recipe of a checkpoint")
    client.create_run(other, start_time=4, tags={"raydit.stage": "evaluate", "raydit.job_id": "job-3"})
    return uri


@pytest.fixture(scope="module")
def failed_job(ray_head, store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", ray_head.token)
        job = jobs.submit(
            ["train", "my.toml"],
            address=ray_head.address,
            submission_id="job-1",
            metadata={"raydit.name": "tiny", "raydit.tracking": store},
            program=("-c", "print('one line'); raise SystemExit(3)"),
        )
        assert jobs.follow(job, ray_head.address, write=lambda line: None) == 3
    return job


@pytest.fixture
def raydit_jobs(ray_head, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setenv("RAY_AUTH_TOKEN", ray_head.token)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_head.address)
        monkeypatch.setattr(sys, "argv", ["raydit", "jobs", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_a_job_is_listed_with_its_state_and_recipe(raydit_jobs, failed_job):
    code, out, _ = raydit_jobs("list")
    (line,) = [line for line in out.splitlines() if line.startswith(failed_job)]
    assert (
        code == 0 and line.split()[1] == "FAILED" and line.split()[-5:] == ["UTC", "tiny", "raydit", "train", "my.toml"]
    )
    _, out, _ = raydit_jobs("list", "--json")
    (listed,) = [job for job in json.loads(out) if job["submission_id"] == failed_job]
    assert (listed["status"], listed["exit_code"], listed["command"]) == ("FAILED", 3, "train my.toml")


@pytest.mark.slow
def test_the_status_of_a_job_names_its_runs(raydit_jobs, failed_job, store):
    code, out, _ = raydit_jobs("status", failed_job)
    assert code == 0
    assert "status       FAILED, exit code 3" in out and f"tracking     {store}\n" in out
    runs = [line.split()[1:3] for line in out.splitlines() if line.startswith("run ")]
    assert runs == [["encode", "KILLED"], ["train", "KILLED"]]
    _, out, _ = raydit_jobs("status", failed_job, "--json")
    assert [run["stage"] for run in json.loads(out)["runs"]] == ["encode", "train"]


@pytest.mark.slow
def test_the_log_of_a_job_and_with_follow_its_exit_code(raydit_jobs, failed_job):
    code, out, _ = raydit_jobs("logs", failed_job)
    assert (code, out.splitlines()[-1]) == (0, "one line")
    code, out, _ = raydit_jobs("logs", "-f", failed_job)
    assert code == 3 and "one line" in out.splitlines()


@pytest.mark.slow
def test_stopping_a_job_that_has_ended_is_no_error(raydit_jobs, failed_job):
    assert raydit_jobs("stop", failed_job)[:2] == (0, f"stop         {failed_job} had already ended\n")


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_an_unknown_job_is_named_with_where_to_look(raydit_jobs, command):
    code, out, err = raydit_jobs(command, "nowhere")
    assert (code, out) == (2, "")
    assert err.strip().startswith("raydit: no job nowhere at http://") and "raydit jobs list" in err


def test_no_jobs_are_said_with_how_to_start_one(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "list_jobs", lambda address: [])
    job_commands.list_jobs.callback("http://head:8265", as_json=False)
    assert capsys.readouterr().out == "no jobs at http://head:8265; start one: raydit submit -- run RECIPE\n"


def job(tracking):
    return Job(
        submission_id="job-1",
        status="RUNNING",
        command="",
        started=None,
        exit_code=None,
        message="",
        metadata={"raydit.name": "tiny", "raydit.tracking": tracking},
    )


def test_a_store_that_is_away_or_not_known_costs_only_the_runs():
    runs, reason = find_runs(job("http://127.0.0.1:9"))
    assert runs == [] and "does not answer" in reason
    assert find_runs(job("")) == ([], "")
    with answering(401, b"You are not authenticated.") as (uri, _):
        runs, reason = find_runs(job(uri))
    assert runs == [] and "its runs are unknown" in reason and "the server refuses access" in reason


def test_runs_on_a_server_have_links(store, monkeypatch):
    import mlflow

    here = mlflow.MlflowClient(store)
    monkeypatch.setattr(mlflow, "MlflowClient", lambda uri: here)
    encode, _ = runs_of_job("https://mlflow.example.com/", "job-1")
    assert encode["link"] == f"https://mlflow.example.com/#/experiments/1/runs/{encode['id']}"
    assert runs_of_job("https://mlflow.example.com/", "never run") == []


def test_the_runs_of_a_job_are_found_in_an_experiment_of_another_name(store):
    """A job that evaluates a checkpoint is named after its folder."""
    (evaluate,) = runs_of_job(store, "job-3")
    assert evaluate["stage"] == "evaluate"
