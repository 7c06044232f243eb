"""`raydit runs best` after `raydit evaluate --repeats`: the first seed's protocol, with the mean over the seeds."""

import json
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from mlflow_server import wait_until
from tiny_story import ERROR, tell_evaluation, tell_story

from pipelines.registry.repeats import SeededProtocol, average_repeats, first_of_seeds
from pipelines.stage import StageContext
from pipelines.tracking import tags
from pipelines.tracking.run_log import flatten

VALUES = {2: (30.0, 24.0, 24.0), 4: (20.0, 28.0, 33.0), 6: (29.0, 29.0, 29.0)}
"""By step, for each seed: by the mean 2 is the best, by the first seed alone 4. Means 26, 27 and 29."""


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """A story whose checkpoints were scored with seeds 10, 11 and 12, one checkpoint after another, and its reports."""
    story = tell_story(tmp_path_factory.mktemp("story"))
    client, reports = MlflowClient(story.uri), {}
    experiment = client.get_experiment_by_name("tiny").experiment_id
    for step, values in VALUES.items():
        for seed, value in enumerate(values, 10):
            config = replace(story.config, seed=seed)
            with StageContext(config) as context:
                report = tell_evaluation(context, config, story.checkpoints[step], value)
                wait_until(lambda context=context: not context.tracker._journal.undelivered)
            reports[step, seed] = report
            query = f"{tags.has(tags.PROTOCOL_ID, report.protocol_id)} AND "
            query += tags.has(tags.CHECKPOINT_DIGEST, report.checkpoint_digest)
            (run,) = client.search_runs([experiment], query)
            for name, text in flatten(report.protocol.to_dict(), "protocol.").items():  # as `raydit evaluate`
                client.log_param(run.info.run_id, name, text)
    return story, reports


@pytest.fixture
def best(repeated, raydit):
    def call(*flags):
        code, out, err = raydit("runs", "best", "tiny", "--store", repeated[0].uri, *flags, "--json")
        assert code == 0, err
        *lines, result = out.splitlines()
        return json.loads(result), lines

    return call


def test_checkpoints_are_ranked_by_the_mean_of_their_seeds_and_by_the_first_ones_protocol(best, repeated):
    found, lines = best()
    _, reports = repeated
    assert found["protocol_id"] == reports[2, 10].protocol_id
    # Standard errors: sqrt(12 / 3) of 30, 24, 24, and sqrt(43 / 3) of 20, 28, 33.
    assert [(each["step"], each["value"], each["error"], each["seeds"]) for each in found["checkpoints"]] == [
        (2, pytest.approx(26.0), pytest.approx(2.0), 3),
        (4, pytest.approx(27.0), pytest.approx((43 / 3) ** 0.5), 3),
        (6, pytest.approx(29.0), 0.0, 3),
    ]
    headline = reports[2, 10].headline
    report = replace(reports[4, 10], repeats={headline: list(VALUES[4])})
    assert report.estimate(headline) == pytest.approx(
        (found["checkpoints"][1]["value"], found["checkpoints"][1]["error"])
    )
    assert "26 +- 2 (3 seeds)" in lines[1]


def test_the_protocol_of_another_seed_has_its_own_scores(best, repeated):
    found, lines = best("--protocol", repeated[1][2, 12].protocol_id)
    assert [(each["step"], each["value"], each["error"], each["seeds"]) for each in found["checkpoints"]] == [
        (2, 24.0, ERROR, 1),
        (6, 29.0, ERROR, 1),
        (4, 33.0, ERROR, 1),
    ]
    assert "24 +- 0.5 " in lines[1] and "seeds)" not in "\n".join(lines)


def test_only_protocols_of_the_preceding_seeds_come_first():
    seeds = {f"p{seed}": SeededProtocol("p", seed) for seed in (0, 1, 2, 5)} | {"q0": SeededProtocol("q", 0)}
    among = ["p2", "p1", "p5", "p0", "q0", "unknown"]
    for each, first in (("p2", "p0"), ("p5", "p5"), ("q0", "q0"), ("unknown", "unknown")):
        assert first_of_seeds(each, among, seeds) == first
    assert first_of_seeds("p2", ["p2", "p0"], seeds) == "p2"


def test_a_mean_is_over_the_newest_scores_of_one_checkpoint_and_one_metric():
    seeds = {f"p{seed}": SeededProtocol("p", seed) for seed in (0, 1)} | {"q1": SeededProtocol("q", 1)}

    def score(protocol, value, time=0, digest="d", metric="m"):
        about = {"protocol_id": protocol, "digest": digest, "metric": metric, "error": None}
        return {**about, "value": value, "time": time}

    scores = [score("p0", 1.0), score("p1", 3.0, 2), score("p1", 9.0, 1)]
    scores += [score("p1", 50.0, digest="e"), score("p1", 60.0, metric="n"), score("q1", 70.0), score("x", 80.0)]
    (averaged,) = average_repeats(scores[:1], scores, seeds)
    assert averaged == {**scores[0], "value": 2.0, "error": pytest.approx(1.0), "seeds": 2}
    assert average_repeats(scores[3:], scores, seeds) == [{**each, "seeds": 1} for each in scores[3:]]
