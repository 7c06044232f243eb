"""What MLflow takes of a training after other things: scores of its checkpoints, pictures that were drawn again."""

import json
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow_server import close_delivered
from PIL import Image

from pipelines.config.reader import load_recipe
from pipelines.tracking.model_writer import ModelWriter, _score_protocols
from pipelines.tracking.tracker import Tracker

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def config(request, tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [f"name={tmp_path.name}", f"output={tmp_path}/output", f"tracking.uri={store}"]
    return load_recipe(request.config.rootpath / "tests/recipes/tiny.toml", given)


@pytest.fixture
def training(config):
    """Return the run of the training as MLflow has it."""

    def find():
        client = MlflowClient(config.tracking.uri)
        experiment = client.get_experiment_by_name(config.name).experiment_id
        (found,) = client.search_runs([experiment], "tags.`raydit.stage` = 'train'")
        return client, found

    return find


def log_model(run):
    run.model(DIGEST, name="step_2", step=2, params={}, tags={"raydit.checkpoint_digest": DIGEST})


def log_scores(tracker, protocol, metrics, disqualified=""):
    run = tracker.start_run("evaluate", {"protocol": protocol})
    log_model(run)
    if disqualified:
        run.tag("raydit.disqualified", disqualified)
    run.metrics({f"eval/{name}": value for name, value in metrics.items()}, 2, model=DIGEST, dataset=("p", protocol))
    run.metrics({f"eval_error/{name}": 0.5 for name in metrics}, 2, model=DIGEST, dataset=("p", protocol))
    if not disqualified:
        run.scores(DIGEST, metrics, 2, protocol)
    run.end("FINISHED")


def test_a_training_that_comes_after_its_evaluations_has_their_scores(config, training):
    """As after an outage, if the evaluations' journal is delivered first; and a run that replaces a deleted one."""
    tracker = Tracker.open(config, "evaluations")
    log_scores(tracker, "aaaaaaaaaaaa", {"fid_50k": 5.0, "is_50k": 90.0})
    log_scores(tracker, "bbbbbbbbbbbb", {"fid_50k": 4.0})
    log_scores(tracker, "cccccccccccc", {"fid_1k": 1.0}, disqualified="a constant image")
    close_delivered(tracker)
    tracker = Tracker.open(config)
    run = tracker.start_run("train", {})
    log_model(run)
    expected = {"eval/fid_50k": 5.0, "eval/is_50k": 90.0, "eval/bbbbbbbbbbbb/fid_50k": 4.0}
    close_delivered(tracker)
    client, first = training()
    assert first.data.metrics == expected
    tracker = Tracker.open(config, "evaluations")
    log_scores(tracker, "aaaaaaaaaaaa", {"fid_50k": 5.0, "is_50k": 90.0})  # again: it has them
    close_delivered(tracker)
    history = client.get_metric_history(first.info.run_id, "eval/fid_50k")
    assert [(point.step, point.value) for point in history] == [(2, 5.0)]

    client.delete_run(first.info.run_id)
    tracker = Tracker.open(config)
    tracker.start_run("train", {}).end("FINISHED")
    close_delivered(tracker)
    assert training()[1].data.metrics == expected


def test_scores_of_any_number_have_a_tag_for_each_protocol(config, training):
    """All of them would not fit into one."""
    tracker = Tracker.open(config)
    run = tracker.start_run("train", {})
    log_model(run)
    scores = {
        f"{protocol:012x}": {f"fd_of_a_long_name_{protocol}_{n}": 1.0 for n in range(13)} for protocol in range(16)
    }
    for protocol, metrics in scores.items():
        run.scores(DIGEST, metrics, 2, protocol)
    run.end("FINISHED")
    close_delivered(tracker)
    _, found = training()
    assert found.data.metrics == {f"eval/{name}": 1.0 for metrics in scores.values() for name in metrics}
    kept = {name: value for name, value in found.data.tags.items() if name.startswith("raydit.scores")}
    assert kept == {f"raydit.scores.{protocol}": " ".join(sorted(names)) for protocol, names in scores.items()}


def test_the_tag_of_older_versions_is_read_also_where_it_was_cut():
    older = json.dumps({"fid_50k": "aaaaaaaaaaaa", "is_50k": "bbbbbbbbbbbb"})
    assert _score_protocols({"raydit.scores": older}) == {"fid_50k": "aaaaaaaaaaaa", "is_50k": "bbbbbbbbbbbb"}
    assert _score_protocols({"raydit.scores": older[:-9] + "..."}) == {"fid_50k": "aaaaaaaaaaaa"}
    newer = {"raydit.scores": older, "raydit.scores.cccccccccccc": "kid_50k sfid_50k"}
    assert _score_protocols(newer)["sfid_50k"] == "cccccccccccc"


def test_a_run_that_knows_a_metrics_protocol_keeps_it_apart_from_another_one():
    logged = []
    client = SimpleNamespace(
        log_batch=lambda run_id, metrics: logged.extend(metric.key for metric in metrics), set_tag=lambda *_: None
    )
    writer = ModelWriter()
    writer._client = client
    run = SimpleNamespace(
        info=SimpleNamespace(run_id="1"),
        data=SimpleNamespace(tags={"raydit.scores": '{"fid_50k": "aaaaaaaaaaaa"}'}, metrics={}),
    )
    writer._log_scores(run, {"fid_50k": 1.0}, 2, "bbbbbbbbbbbb", 0)
    assert logged == ["eval/bbbbbbbbbbbb/fid_50k"]


def test_a_picture_that_was_drawn_again_is_not_taken_for_the_runs(config, training, monkeypatch, capsys, tmp_path):
    """MLflow is away while two trainings draw into one output; the older journal's entry has no digest."""

    def unreachable(*arguments, **options):
        raise ConnectionRefusedError("down")

    def draw(color):
        (tmp_path / "output" / "samples").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), color).save(tmp_path / "output" / "samples" / "step_2.png")
        return tmp_path / "output" / "samples" / "step_2.png"

    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "create_run", unreachable)
        tracker = Tracker.open(config)
        first = tracker.start_run("train", {})
        first.image(draw("red"), "samples", 2)
        first.artifact(draw("red"), "samples")
        first.append("artifact", path=str(draw("red")), folder="older")
        first.artifact(config.output + "/samples/report.json")
        (tmp_path / "output" / "samples" / "report.json").write_text("{}")  # completed after it was logged
        second = tracker.start_run("encode", {})
        second.image(draw("blue"), "samples", 2)
    close_delivered(tracker)
    client, run = training()
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"older", "report.json"}
    experiment = client.get_experiment_by_name(config.name).experiment_id
    (other,) = client.search_runs([experiment], "tags.`raydit.stage` = 'encode'")
    assert len(client.list_artifacts(other.info.run_id, "images")) == 2
    said = capsys.readouterr().out
    assert said.count("step_2.png was written again before MLflow took it") == 1 and "refuse" not in said
