"""What an earlier version of raydit left in a store, and could not deliver any more, is read and gone on with."""

import gzip
import json
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import close_delivered
from tiny import tiny_recipe
from tiny_story import SCORES

from pipelines.artifacts import digest_of
from pipelines.registry.best import best_checkpoints
from pipelines.registry.queries import list_runs, show_run
from pipelines.tracking.delivery import journal_path
from pipelines.tracking.lookup import find_checkpoint, protected_digests
from pipelines.tracking.store import check_tracking
from pipelines.tracking.tracker import Tracker

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module", params=["older_store.json.gz", "707a9da/store.json.gz"])
def older(request, tmp_path_factory):
    """The recipe of a folder with the older database and journal, and digests of its checkpoints by step."""
    folder = tmp_path_factory.mktemp("older")
    text = gzip.decompress((GOLDEN / request.param).read_bytes()).decode()
    content = json.loads(text.replace("@FOLDER@", str(folder)))
    database = sqlite3.connect(folder / "mlflow.db")
    database.executescript(content["database"])
    database.close()
    config = tiny_recipe(folder)
    journal = Path(config.output) / ".tracking" / f"{digest_of(config.tracking.uri)[:12]}.jsonl"
    assert journal == journal_path(config.output, config.tracking.uri)
    journal.parent.mkdir(parents=True)
    journal.write_text(content["told"] + content["untold"])
    state = {"offset": len(content["told"].encode()), "known": content["known"]}
    journal.with_suffix(".state.json").write_text(json.dumps(state))
    return config, {int(step): digest for step, digest in content["digests"].items()}


def test_its_runs_scores_and_models_are_found(older):
    config, digests = older
    uri = config.tracking.uri
    assert check_tracking(uri) == "2 experiments"
    runs = list_runs(uri, experiment="tiny")
    assert {"encode", "evaluate", "pipeline", "train"} == {run["stage"] for run in runs}
    (train,) = [run for run in runs if run["stage"] == "train"]
    assert train["metrics"] == {"train/loss": 0.5, "train/images_per_second": 8.0}
    shown = show_run(uri, train["name"])
    assert {model["digest"] for model in shown["models"]} == set(digests.values())
    found = best_checkpoints(uri, "tiny")
    best = found["checkpoints"]
    assert found["protocol"] == "" or found["protocol"].startswith("N=16, euler 2, cfg 1")  # of params, if it has any
    assert [(each["step"], each["value"]) for each in best] == [(step, SCORES[step]) for step in (4, 6, 2)]
    assert find_checkpoint(uri, "models:/tiny-dit@champion").digest == digests[4]
    assert protected_digests(uri) == {digests[4]}


def test_what_it_could_not_deliver_is_delivered_and_a_cut_off_run_is_taken_up(older):
    config, _ = older
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    before = client.search_runs([experiment])
    close_delivered(Tracker.open(config))
    new = [
        run for run in client.search_runs([experiment]) if run.info.run_id not in {run.info.run_id for run in before}
    ]
    assert [(run.data.tags["raydit.stage"], run.info.status, run.data.metrics) for run in new] == [
        ("encode", "FINISHED", {"encode/images": 24.0})
    ]
    tracker = Tracker.open(config)
    tracker.start_run("encode", {"untold": True}).end("FINISHED")  # again: it had ended
    close_delivered(tracker)
    assert len(client.search_runs([experiment])) == len(before) + 2
