"""The whole story away from this machine's disk: a job on a Ray head, its output on S3, its runs on an MLflow server.

What opens both is in the environment of the head alone.
"""

import time
from pathlib import Path

import pytest
from away import SECRETS, Away, assert_same, report_of
from mlflow import MlflowClient
from ray_head import RayHead, started_head
from tiny import RECIPE

from cluster import jobs

LAST = "step_0000006"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:ssl=None is deprecated")]


def test_a_job_with_its_output_in_a_bucket_has_the_numbers_of_one_on_disk_and_tells_no_secret(away, finished):
    here, config = finished
    with started_head(**away.variables) as head:
        assert away.submit(head, RECIPE, f"images.path={here / 'images'}").wait(timeout=600) == 0, away.said()
        known_of_jobs = jobs_of(head)
        texts = {file: file.read_bytes() for folder in (Path(head.folder), away.folder) for file in files_below(folder)}
    objects = away.objects()
    assert_same(objects, here / "output", LAST)
    runs = {run.data.tags["raydit.stage"]: run for run in runs_of(away)}
    assert set(runs) == {"pipeline", "autoencoder", "encode", "train", "evaluate"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    report = report_of(objects, LAST)
    scores = {name: value for name, value in report["metrics"].items() if value is not None}
    assert {name: runs["evaluate"].data.metrics[f"eval/{name}"] for name in scores} == scores
    found = MlflowClient(away.store).search_logged_models([runs["train"].info.experiment_id])
    steps = {model.tags["raydit.checkpoint"] for model in found}
    assert steps == {f"s3://{away.bucket}/out/checkpoints/step_{step:07d}" for step in (2, 4, 6)}
    looked_at = " ".join(map(str, texts))
    assert all(name in looked_at for name in ("job-driver-", "worker-", ".jsonl", "mlflow.db", "files/", "said"))
    for secret in SECRETS.values():
        assert secret not in known_of_jobs
        assert not [name for name, content in {**objects, **texts}.items() if secret.encode() in content]


def test_a_head_that_is_lost_costs_a_job_nothing_but_time(away, finished):
    here, config = finished
    with started_head(**away.variables) as head:
        process = away.submit(head, RECIPE, f"images.path={here / 'images'}")
        while not away.names("out/checkpoints/step_0000002/COMPLETE"):
            assert process.poll() is None, away.said()
            time.sleep(0.05)
        head.kill()
        assert process.wait(timeout=120) == 1
    assert "no job server answers at" in away.said() and "Traceback" not in away.said()
    before = away.said()
    # Another machine: of what the first had on its own disk nothing is left.
    variables = {**away.variables, "XDG_CACHE_HOME": str(away.folder / "another")}
    with started_head(**variables) as head:
        assert away.submit(head, RECIPE, f"images.path={here / 'images'}").wait(timeout=600) == 0, away.said()
    assert away.said().removeprefix(before).count("already finished") >= 2
    assert_same(away.objects(), here / "output", LAST)
    # The first machine's journal is lost as well; its unfinished runs are taken up all the same.
    runs = [(run.data.tags["raydit.stage"], run.info.status) for run in runs_of(away)]
    assert sorted(runs) == [(stage, "FINISHED") for stage in sorted({stage for stage, _ in runs})]
    assert {"pipeline", "train", "evaluate"} <= {stage for stage, _ in runs}
    assert losses_of(away.store) == losses_of(config.tracking.uri)


def losses_of(store: str) -> dict[int, set[float]]:
    """The losses of all runs, by step: the same step twice must be the same number."""
    client, losses = MlflowClient(store), {}
    for run in client.search_runs([client.get_experiment_by_name("tiny").experiment_id]):
        for point in client.get_metric_history(run.info.run_id, "train/loss"):
            losses.setdefault(point.step, set()).add(point.value)
    assert all(len(values) == 1 for values in losses.values()), losses
    return losses


def runs_of(away: Away) -> list:
    client = MlflowClient(away.store)
    return client.search_runs([client.get_experiment_by_name("tiny").experiment_id])


def jobs_of(head: RayHead) -> str:
    """All that the job server tells of its jobs, and their logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", head.token)
        client = jobs._client(head.address)
        details = client.list_jobs()
        assert details
        return repr([vars(each) for each in details]) + client.get_job_logs(details[0].submission_id)


def files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
