"""An evaluation by several extractors gives, to the bit, the numbers of a run with each of them alone."""

import json
from pathlib import Path

import pytest
from second_extractor import SECOND, write_second_weights
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.reader import resolved, validate_recipe
from pipelines.evaluate import evaluate
from pipelines.evaluate_images import evaluate_images
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.score_checkpoint import CheckpointEvaluation
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.stage import StageContext

pytestmark = pytest.mark.slow  # the second extractor takes a fifth of a second for an image

FIRST = "efficientnet-lite0"
SCORES = ("protocol", "metrics", "errors", "real_baseline", "reconstructions", "missing", "curve", "disqualified")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """recipe(name, *overrides): the recipe of an output of that name; all have the same images and checkpoint."""
    folder = tmp_path_factory.mktemp("several")
    weights = write_second_weights(folder / "second.pth")
    settings = ["evaluate.num_samples=10", "evaluate.shard_rows=4", "evaluate.batch_size=4"]
    settings.append("evaluate.reconstructions=true")

    def build(name, *extractors, num_workers=1):
        (folder / name).mkdir(exist_ok=True)
        own = ["images.path=" + str(folder / "images"), f"evaluate.num_workers={num_workers}"]
        if len(extractors) > 1:
            own.append(f"evaluate.extractors={json.dumps(extractors)}")
            own.append(f'evaluate.extractor_weights={{"{SECOND}"="{weights}"}}')
        else:
            own.append(f"evaluate.extractor={extractors[0]}")
            own += [f"evaluate.extractor_weights={weights}"] if extractors[0] == SECOND else []
        return tiny_output(folder / name, *settings, *own)

    from tiny import write_images

    write_images(folder / "images")
    return build


def checkpoint_of(config):
    folder = Path(config.folder("checkpoints")) / "step_0000002"
    return folder if folder.exists() else write_checkpoint(config, 2).path


def leave_records_of_one_extractor(config):
    """Write the first record of samples, as an interrupted evaluation by the first extractor alone leaves it."""
    opened, settings = open_checkpoint(checkpoint_of(config)), ScoringSettings.from_recipe(config)
    evaluation = CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings)
    ScoringActor(config.images, config.evaluate, [evaluation.source])(evaluation.shards()[0])


def scores(report):
    return {name: getattr(report, name) for name in SCORES}


def test_the_scores_are_those_of_single_extractors_whatever_the_workers(recipe, local_ray, raydit, monkeypatch):
    singles = []
    for extractor in (FIRST, SECOND):
        config = recipe("singles", extractor)
        singles.append(evaluate(checkpoint_of(config), config=config))
    leave_records_of_one_extractor(recipe("both", FIRST))
    config = recipe("both", FIRST, SECOND, num_workers=2)
    both = evaluate(checkpoint_of(config), config=config)
    assert [scores(part) for part in both.parts] == [scores(each) for each in singles]
    assert both.metrics == {**singles[0].metrics, **singles[1].metrics}
    folders = [folder.name for folder in Path(config.folder("evaluations")).iterdir()]
    assert folders == [singles[0].protocol_id]
    (folder,) = Path(config.folder("evaluations")).glob("*/step_0000002")
    assert not list(folder.glob("shards-*")) and (folder / "report.html").exists()
    monkeypatch.setattr(StageContext, "start_ray", lambda *_: pytest.fail("Ray was started"))
    for extractors in ((FIRST, SECOND), (FIRST,)):
        again = recipe("both", *extractors)
        assert evaluate(checkpoint_of(again), config=again) == both


def test_an_extractor_that_is_added_later_joins_the_report_of_the_first(recipe, local_ray):
    config = recipe("later", FIRST)
    one = evaluate(checkpoint_of(config), config=config)
    config = recipe("later", FIRST, SECOND)
    both = evaluate(checkpoint_of(config), config=config)
    assert scores(both.parts[0]) == scores(one) and both.protocols[1].extractor.startswith(SECOND)
    (file,) = Path(config.folder("evaluations")).rglob("report.json")
    stored = json.loads(file.read_text())
    assert stored["protocols"] == {each.extractor: each.protocol_id for each in both.protocols}
    assert EvaluationReport.from_json(file.read_text()) == both


def test_given_images_are_scored_by_each_extractor(recipe, local_ray):
    images = str(Path(recipe("given", FIRST).images.path) / "ring")
    reports = []
    for name, extractors in (("given", (FIRST,)), ("given", (SECOND,)), ("given-both", (FIRST, SECOND))):
        config = recipe(name, *extractors)
        with StageContext(config, part="evaluations") as context:
            reports.append(evaluate_images(images, config=config, context=context)[0])
            folder = evaluate_images(images, config=config, context=context)[1]
        assert not list(Path(folder).glob("shards-*"))
    first, second, both = reports
    assert [scores(part) for part in both.parts] == [scores(first), scores(second)]


def test_a_checkpoint_records_the_extractors_of_its_recipe(recipe):
    config = recipe("recorded", FIRST, SECOND)
    assert validate_recipe(json.loads(json.dumps(resolved(config)))) == config
