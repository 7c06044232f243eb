"""`raydit runs` and `raydit promote` on a store that a pipeline was told to."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow_server import wait_until
from tiny_story import ERROR, SCORES, tell_evaluation

from pipelines.checkpoints.open import open_checkpoint
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.settings import ScoringSettings
from pipelines.stage import StageContext
from pipelines.tracking.experiment_page import (
    VIEW_TAG,
    ViewContent,
    experiment_tags,
    landing_page,
    read_content,
    update_view,
)
from pipelines.tracking.lookup import find_checkpoint
from pipelines.tracking.provenance import code_label, code_tags

METRIC = "fd_efficientnet_lite0_16"


@pytest.fixture
def asked(raydit, story, monkeypatch, tmp_path):
    """Call a command on the story's store, and take its JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*arguments):
        code, out, err = raydit(*arguments, "--store", story.uri, "--json")
        assert code == 0, err
        *lines, result = out.splitlines()
        return json.loads(result), "\n".join(lines)

    return call


def test_runs_are_listed_newest_first_with_what_they_are_known_by(asked, story):
    found, shown = asked("runs", "list", "tiny")
    stages = [run["stage"] for run in found["runs"]]
    assert {"encode", "evaluate", "pipeline", "train"} == set(stages)
    starts = [run["start"] for run in found["runs"]]
    assert starts == sorted(starts, reverse=True)
    (train,) = asked("runs", "list", "tiny", "--stage", "train")[0]["runs"]
    assert (train["status"], train["experiment"]) == ("FINISHED", "tiny")
    assert train["metrics"] == {"train/loss": 0.5, "train/images_per_second": 8.0}
    assert {f"eval/{METRIC}": SCORES[6]} in [run["metrics"] for run in found["runs"]]
    assert train["name"] in shown and f"eval/{METRIC} 20.4" in shown
    assert f"step 6: {story.reports[6].protocol.summary}" in shown and train["id"][:8] in shown
    assert len(asked("runs", "list", "--limit", "2")[0]["runs"]) == 2


def test_a_run_is_shown_with_its_settings_models_and_neighbours(asked, story):
    (train,) = asked("runs", "list", "tiny", "--stage", "train")[0]["runs"]
    for name in (train["id"], train["id"][:8], train["name"]):
        found, shown = asked("runs", "show", name)
        assert found["id"] == train["id"]
    assert found["params"]["train.steps"] == "6" and "train.steps = 6" in shown
    assert {model["digest"] for model in found["models"]} == {each.digest for each in story.checkpoints.values()}
    assert [read["name"] for read in found["inputs"]] == ["latents"]
    code = code_tags(Path(__file__).parents[3])
    assert found["commit"] == code["mlflow.source.git.commit"] and f"commit       {found['commit']}" in shown
    assert found["code_dirty"] == (code["raydit.code_dirty"] == "true")
    assert f"by commit {code_label(code)}" in shown
    (parent,) = found["parent"]
    children = asked("runs", "show", parent["id"])[0]["children"]
    assert sorted(child["stage"] for child in children) == ["encode", "evaluate", "evaluate", "evaluate", "train"]


def test_the_best_checkpoint_is_found_by_the_metrics_own_direction_with_its_error(asked, story):
    found, shown = asked("runs", "best", "tiny")
    assert (found["metric"], found["protocol_id"]) == (METRIC, story.reports[2].protocol_id)
    assert [(each["step"], each["value"], each["error"]) for each in found["checkpoints"]] == [
        (step, SCORES[step], ERROR) for step in (4, 6, 2)
    ]
    assert found["checkpoints"][0]["checkpoint"] == str(story.checkpoints[4].path)
    assert "20 +- 0.5" in shown
    assert {each["commit"] for each in found["checkpoints"]} == {code_label(code_tags(Path(__file__).parents[3]))}
    assert found["checkpoints"][0]["commit"] in shown.splitlines()[1]
    found, _ = asked("runs", "best", "tiny", "--metric", METRIC.replace("fd", "precision", 1))
    assert [each["step"] for each in found["checkpoints"]] == [4, 6, 2] and found["higher_is_better"]


def test_scores_by_another_protocol_are_not_ranked_among_them(asked, story):
    other = replace(story.config, evaluate=replace(story.config.evaluate, cfg_scale=1.5))
    with StageContext(other) as context:
        report = tell_evaluation(context, other, story.checkpoints[2], 1.0)
    found, shown = asked("runs", "best", "tiny")
    assert found["checkpoints"][0]["value"] == 20.0
    assert found["other_protocols"][report.protocol_id] == 1
    summaries = [story.reports[2].protocol.summary, report.protocol.summary]
    assert summaries == [f"N=16, euler 2, cfg {scale}, balanced labels, efficientnet-lite0" for scale in (1, 1.5)]
    assert f"protocol     {found['protocol_id']} ({summaries[0]})" in shown
    assert f"1 scored by {summaries[1]}: --protocol {report.protocol_id}" in shown
    with StageContext(other) as context:
        tell_evaluation(context, other, story.checkpoints[2], 1.0)  # again: it is one checkpoint still
    assert asked("runs", "best", "tiny")[0]["other_protocols"][report.protocol_id] == 1
    found, _ = asked("runs", "best", "tiny", "--protocol", report.protocol_id)
    assert [each["value"] for each in found["checkpoints"]] == [1.0]


def test_stores_of_more_runs_than_an_answer_has_are_read_to_the_end(asked, story, monkeypatch):
    monkeypatch.setattr("pipelines.tracking.searches.PAGE", 2)
    client = MlflowClient(story.uri)
    (experiment,) = [client.get_experiment_by_name("tiny").experiment_id]
    (oldest,) = client.search_runs([experiment], order_by=["attributes.start_time"], max_results=1)
    for name in (oldest.info.run_id, oldest.info.run_id[:8], oldest.info.run_name):
        assert asked("runs", "show", name)[0]["id"] == oldest.info.run_id
    (pipeline,) = client.search_runs([experiment], "tags.`raydit.stage` = 'pipeline'")
    assert len(asked("runs", "show", pipeline.info.run_id)[0]["children"]) == 5
    assert [each["step"] for each in asked("runs", "best", "tiny")[0]["checkpoints"]] == [4, 6, 2]


def test_a_model_that_was_deleted_in_mlflow_is_left_out(asked, story, tmp_path):
    """As of a training whose newest checkpoint somebody has deleted there."""
    client = MlflowClient(story.uri)
    experiment = client.create_experiment("deleted models", str(tmp_path / "mlruns"))
    run = client.create_run(experiment).info.run_id
    models = []
    for step in (1, 2):
        checkpoint = {"raydit.checkpoint": f"/step_{step:07d}", "raydit.checkpoint_digest": f"digest {step}"}
        models.append(client.create_logged_model(experiment, f"step-{step}", run, tags=checkpoint).model_id)
        client.log_outputs(run, [LoggedModelOutput(models[-1], step)])
    client.delete_logged_model(models[1])
    try:
        assert [each["model"] for each in asked("runs", "show", run)[0]["models"]] == [models[0]]
        assert find_checkpoint(story.uri, f"runs:/{run}").digest == "digest 1"
    finally:
        client.delete_experiment(experiment)


def test_a_run_whose_parent_was_removed_for_ever_is_shown_without_it(asked, story, tmp_path):
    """`mlflow gc` removes deleted runs, and leaves their children."""
    client = MlflowClient(story.uri)
    experiment = client.create_experiment("orphans", str(tmp_path / "mlruns"))
    run = client.create_run(experiment, tags={"mlflow.parentRunId": "0" * 32}).info.run_id
    try:
        assert asked("runs", "show", run)[0]["parent"] == []
    finally:
        client.delete_experiment(experiment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "nobody"), "no experiment nobody at sqlite:.*found Default, tiny"),
        (("show", "nobody"), "no run nobody at sqlite:.*expected an id or a name"),
        (("best", "tiny", "--protocol", "0"), "no score by protocol 0 in experiment tiny at sqlite:.*found scores by"),
        (("best", "tiny", "--metric", "loss"), "metric name 'loss', expected a name such as fid_50k"),
        (("best", "tiny", "--metric", "fid_50k"), "no score fid_50k in experiment tiny at sqlite:.*found none"),
    ],
)
def test_what_is_not_there_is_said(raydit, story, arguments, message):
    code, _, err = raydit("runs", *arguments, "--store", story.uri)
    assert code == 2 and re.search(message, err)


def test_to_ask_a_store_that_is_not_there_does_not_make_one(raydit, tmp_path):
    code, _, err = raydit("runs", "list", "--store", f"sqlite:///{tmp_path}/mlflow.db")
    assert code == 2 and f"found no MLflow store at sqlite:///{tmp_path}/mlflow.db, expected the database" in err
    assert not list(tmp_path.iterdir())


def test_a_defective_checkpoint_never_wins_whatever_its_score(asked, story, raydit):
    """Its samples are of a single colour: neither best, nor champion, nor challenger."""
    config = replace(story.config, seed=7)
    defect = "16 of 16 samples are of a single colour"
    with StageContext(config, part="evaluations") as context:
        for step, value in ((2, 0.5), (4, 21.0)):
            tell_evaluation(context, config, story.checkpoints[step], value, disqualified=defect if step == 2 else "")
        wait_until(lambda: not context.tracker._journal.undelivered)
    protocol = evaluation_protocol(ScoringSettings.from_recipe(config), open_checkpoint(story.checkpoints[2].path))
    found, _ = asked("runs", "best", "tiny", "--protocol", protocol.protocol_id)
    assert [(each["step"], each["value"]) for each in found["checkpoints"]] == [(4, 21.0)]
    flags = ("--name", "sound", "--protocol", protocol.protocol_id, "--json")
    code, out, err = raydit("promote", str(story.checkpoints[2].path), *flags)
    assert code == 0 and json.loads(out.splitlines()[-1])["given"] is False, out + err
    assert f"models:/sound stays as it is: {defect}" in out


def test_scores_by_several_protocols_stand_apart_on_a_model_with_their_names(asked, story):
    """MLflow's tables have a column for each metric and data set."""
    other = replace(story.config, evaluate=replace(story.config.evaluate, cfg_scale=3.0))
    with StageContext(other) as context:
        report = tell_evaluation(context, other, story.checkpoints[6], 2.0)
    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    same = f"tags.`raydit.checkpoint_digest` = '{report.checkpoint_digest}'"
    (model,) = client.search_logged_models([experiment], filter_string=same)
    scores = {(m.dataset_name, m.dataset_digest): m.value for m in model.metrics if m.key == f"eval/{METRIC}"}
    protocols = [story.reports[6].protocol, report.protocol]
    expected = dict(zip([(each.summary, each.protocol_id) for each in protocols], (SCORES[6], 2.0), strict=True))
    assert expected.items() <= scores.items()
    name = f"step 6: {report.protocol.summary}"
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    (read,) = run.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("reference", report.protocol.reference_digest[:36])
    found, shown = asked("runs", "show", name)
    assert f"protocol     {report.protocol.label}" in shown and found["protocol"] == report.protocol.summary


def test_scores_lie_on_the_run_of_the_training_with_one_value_at_a_step_and_apart_by_protocol(story):
    other = replace(story.config, evaluate=replace(story.config.evaluate, cfg_scale=4.0))
    with StageContext(other) as context:
        report = tell_evaluation(context, other, story.checkpoints[2], 1.0)
        tell_evaluation(context, story.config, story.checkpoints[4], 99.0)  # as after --force with other code
    client = MlflowClient(story.uri)
    (experiment,) = [client.get_experiment_by_name("tiny")]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`raydit.stage` = 'train'")

    def points(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]

    assert points(f"eval/{METRIC}") == list(SCORES.items())
    assert points(f"eval/{report.protocol_id}/{METRIC}") == [(2, 1.0)]
    assert read_content(experiment.tags[VIEW_TAG]) == ViewContent(0, f"eval/{METRIC}")


def test_an_evaluation_reads_the_model_that_a_training_wrote(story):
    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    same = f"tags.`raydit.checkpoint_digest` = '{story.checkpoints[6].digest}'"
    (model,) = client.search_logged_models([experiment], filter_string=same)
    assert model.tags["mlflow.note.content"].startswith("Step 6 of the recipe `tiny`: transformer, width 32, depth 1")
    name = f"step 6: {story.reports[6].protocol.summary}"
    (found,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    (read,) = client.get_run(found.info.run_id).inputs.model_inputs
    assert read.model_id == model.model_id


def test_the_ui_opens_with_the_charts_of_the_newest_experiments_trainings(story):
    client = MlflowClient(story.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    assert landing_page(client) == (
        f"/#/experiments/{experiment}/runs?workflowType=machine_learning"
        "&compareRunsMode=CHART&viewStateShareKey=raydit-trainings"
    )


def test_the_view_has_a_picture_once_there_are_samples(story):
    client = MlflowClient(story.uri)
    experiment = client.create_experiment("pictured", tags=experiment_tags("pictured"))
    update_view(client, experiment, samples_step=350)
    update_view(client, experiment, score="eval/fid_50k")
    view = client.get_experiment(experiment).tags[VIEW_TAG]
    assert read_content(view) == ViewContent(350, "eval/fid_50k")
    state = json.loads(json.loads(view)["state"])
    assert [chart["type"] for chart in state["compareRunCharts"]][:2] == ["IMAGE", "LINE"]
    assert state["selectedColumns"][0] == "metrics.`eval/fid_50k`"
    client.delete_experiment(experiment)
