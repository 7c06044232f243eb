"""Promotion where the registry has lost something, MLflow is away, or a checkpoint cannot be opened again."""

import json
import shutil
from types import SimpleNamespace

import mlflow.pyfunc
import pytest

from pipelines import evaluate
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry import promotion
from pipelines.registry.promotion_score import SCORE_TAGS, PromotionScore
from pipelines.registry.registered_model import RegisteredModel
from pipelines.tracking.lookup import _digests_with_predecessors, dangling_aliases, model_id_of
from raydit.errors import InvalidInput, Unreachable

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def promote(story):
    def call(step, name, **options):
        return promotion.promote_report(story.uri, story.config.name, name, story.reports[step], **options)

    return call


@pytest.mark.parametrize("alias", ["champion", "challenger"])
def test_a_checkpoint_whose_files_were_lost_is_promoted_again(story, promote, store, alias):
    name = f"lost-{alias}"
    assert promote(4, name, alias=alias).given
    assert promote(4, name, alias=alias) == (f"models:/{name}@{alias} is already this checkpoint", False)
    model = model_id_of(store.get_model_version_by_alias(name, alias))
    shutil.rmtree(store.get_logged_model(model).artifact_location.removeprefix("file://"))
    assert f"models:/{name}@{alias}" in dangling_aliases(story.uri)[0]
    again = promote(4, name, alias=alias)
    assert again.given and "is now version 1: 20, its files were missing" in again.explanation
    assert f"models:/{name}@{alias}" not in dangling_aliases(story.uri)[0]


def test_a_version_of_a_deleted_model_is_not_used_again(story, store):
    """Its source no longer resolves, whatever its score."""
    score = PromotionScore("d", "p", "fid_50k", 1.0, 0.1)
    old = {tag: str(getattr(score, field)) for field, tag in SCORE_TAGS.items()}
    created = []

    def create(name, source, **options):
        created.append((source, options["model_id"]))
        return SimpleNamespace(version=2)

    client = SimpleNamespace(
        search_model_versions=lambda query: [SimpleNamespace(version=1, source="models:/m-01d", tags=old)],
        create_model_version=create,
        set_logged_model_tags=lambda *arguments: None,
    )
    about = {"raydit.checkpoint": "step_0000004", "raydit.step": "4"}
    for model, number in (("m-ce3", "2"), ("m-01d", "1")):
        found = SimpleNamespace(model_id=model, source_run_id="r", tags={})
        assert RegisteredModel(client, story.uri, "x").add_version(found, about, score) == number
    assert created == [("models:/m-ce3", "m-ce3")]


def test_no_rollback_makes_a_version_champion_that_never_was(story, promote, store):
    """Version 2 was challenger after version 1, and then the first champion. Older versions' tag names no alias."""
    assert promote(2, "aliases", alias="challenger").given and promote(4, "aliases", alias="challenger").given
    assert promote(4, "aliases").given
    with pytest.raises(InvalidInput, match="models:/aliases@champion is version 2, and found no version that held"):
        promotion.rollback(story.uri, "aliases")
    digests = {step: story.checkpoints[step].digest for step in (2, 4)}
    assert _digests_with_predecessors(store, "aliases", "2", "champion") == {digests[4]}
    store.delete_model_version_tag("aliases", "2", "raydit.before.champion")
    store.set_model_version_tag("aliases", "2", "raydit.before", "1")
    assert _digests_with_predecessors(store, "aliases", "2", "champion") == {*digests.values()}
    assert "models:/aliases@champion is version 1 again" in promotion.rollback(story.uri, "aliases")


def test_the_alias_that_has_another_protocol_is_named(story, promote, store):
    assert promote(4, "named", alias="challenger").given
    store.set_model_version_tag("named", "1", "raydit.protocol_id", "another")
    with pytest.raises(InvalidInput, match="by which models:/named@challenger was chosen"):
        promote(4, "named")


def test_a_checkpoint_that_was_opened_with_further_options_is_not_opened_again(story, promote, monkeypatch):
    """As a file of official weights, which its path alone does not open."""

    def refuse(*arguments):
        raise InvalidInput("x.pt is a file", "a checkpoint folder", "add --model")

    opened = open_checkpoint(story.checkpoints[4].path)
    monkeypatch.setattr(promotion, "open_checkpoint", refuse)
    assert promote(4, "imported", opened=opened).given
    assert mlflow.pyfunc.load_model("models:/imported@champion")


def test_an_outage_does_not_end_a_command_that_promotes(story, raydit, monkeypatch, capsys):
    def away(*arguments, **options):
        raise Unreachable("http://store does not answer", "", "start the server")

    said = []
    context = SimpleNamespace(
        is_writable=True,
        tracker=SimpleNamespace(flush=lambda: None),
        tracking_uri="http://store",
        say=lambda stage, text: said.append(text),
    )
    opened = open_checkpoint(story.checkpoints[4].path)
    with monkeypatch.context() as outage:
        outage.setattr(promotion, "promote_report", away)
        assert not evaluate.promote(context, story.reports[4], opened, experiment="x", model="m")
    assert said == [
        "step_0000004 is not promoted: http://store does not answer. Start the server. The same command, repeated "
        "without --force, promotes it"
    ]

    done = evaluate.FinishedEvaluation(story.reports[4], "folder", story.uri, True)
    for due, expected in ((True, 1), (False, 0)):
        finished = [done._replace(is_promotion_due=due)]
        monkeypatch.setattr(evaluate, "evaluate_each", lambda *arguments, finished=finished, **options: finished)
        code, out, _ = raydit("evaluate", str(opened.path), "--promote", "m", "--json")
        assert code == expected and json.loads(out.splitlines()[-1])["protocol_id"] == story.reports[4].protocol_id
