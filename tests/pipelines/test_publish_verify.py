"""`raydit publish` and `raydit verify` on a real evaluation: what holds, what is found out, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.card import EvaluationCard
from evaluation.report import EvaluationReport
from pipelines.checkpoints.open import open_checkpoint
from pipelines.cli.main import cli
from pipelines.images.open import open_source
from pipelines.scoring import cards
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.protocols.given_recipe import load_given_recipe
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput

pytestmark = pytest.mark.slow


def call(*words):
    """Call raydit; return the exit code, or the error, and the last line as JSON if it is JSON."""
    result = CliRunner().invoke(cli, [*map(str, words), "--json"])
    last = result.output.strip().splitlines()[-1] if result.output.strip() else ""
    return result, json.loads(last) if last.startswith("{") else None


@pytest.fixture(scope="module")
def output(tmp_path_factory, empty_database):
    """The recipe of a checkpoint that was evaluated by other settings than its recipe's, with two seeds."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(empty_database, folder / "mlflow.db")
    config = tiny_output(folder, "evaluate.shard_rows=6", "evaluate.batch_size=4")
    for step in (2, 4):
        write_checkpoint(config, step)
    return config


@pytest.fixture(scope="module")
def checkpoint(output):
    return Path(output.folder("checkpoints")) / "step_0000004"


@pytest.fixture(scope="module")
def published(output, checkpoint, local_ray, tmp_path_factory):
    """The folder of the card."""
    settings = ["--num-samples", "10", "--repeats", "2", "--set", "evaluate.reconstructions=false"]
    result, _ = call("evaluate", checkpoint, *settings, "--set", "evaluate.sampling_steps=1", "--set", "seed=5")
    assert result.exit_code == 0, result.output
    folder = tmp_path_factory.mktemp("card")
    result, printed = call("publish", checkpoint, "--out", folder, "--set", "evaluate.reconstructions=false")
    assert result.exit_code == 0, result.output
    assert printed["card"] == str(folder / "card.json") and printed["digest"] == read(folder).digest
    return folder


@pytest.fixture(scope="module")
def verified(published, tmp_path_factory, empty_database):
    """The folder of a verification, and what it printed last."""
    folder = tmp_path_factory.mktemp("verification")
    shutil.copy(empty_database, folder / "mlflow.db")
    result, printed = call("verify", published, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, printed


def read(folder) -> EvaluationCard:
    return EvaluationCard.from_json((Path(folder) / "card.json").read_bytes())


def tampered(folder, to, change):
    """Copy a card with changed content, and a digest that fits it."""
    content = json.loads((folder / "card.json").read_text())
    del content["digest"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    to.write_text(json.dumps(content))
    return to


def test_a_card_states_what_was_scored(published, output, checkpoint):
    card, opened = read(published), open_checkpoint(checkpoint)
    assert card.checkpoint.digest == opened.digest and card.checkpoint.uri == str(checkpoint)
    numbers = sum(tensor.numel() for tensor in opened.weights("ema").values())
    assert card.checkpoint.parameters == numbers and card.checkpoint.files == opened.files
    assert card.checkpoint.bytes == (checkpoint / "ema.safetensors").stat().st_size
    assert card.num_seeds == 2 and card.report.protocol.seed == 5
    evaluate = card.recipe["evaluate"]
    assert (evaluate["num_samples"], evaluate["sampling_steps"], card.recipe["seed"]) == (10, 1, 5)
    assert card.report.real_baseline and card.environment
    page = (published / "card.md").read_text()
    assert card.report.protocol_id in page and opened.digest in page


def test_the_recipe_of_a_card_gives_its_protocol(published, checkpoint):
    card, opened = read(published), open_checkpoint(checkpoint)
    config = load_given_recipe(str(published / "recipe.toml"), (f"random={card.recipe['random']}",))(opened)
    protocol = evaluation_protocol(ScoringSettings.from_recipe(config), opened)
    assert protocol.protocol_id == card.report.protocol_id
    assert card.command.startswith(f"raydit evaluate {checkpoint} --recipe recipe.toml --repeats 2")


def test_scores_that_are_computed_again_are_equal_to_the_bit(published, output, verified):
    folder, printed = verified
    assert printed["holds"] and {score["verdict"] for score in printed["scores"]} == {"equal"}
    names = {score["name"] for score in printed["scores"]}
    assert {"fd_efficientnet_lite0_10", "fd_efficientnet_lite0_10, seed 6"} <= names
    assert any(name.endswith(", real images") for name in names)
    again = EvaluationReport.from_json((Path(printed["report"]) / "report.json").read_bytes())
    assert Path(printed["report"]).is_relative_to(folder) and (folder / "mlflow.db").is_file()
    assert again.date != "" and list((folder / "references").glob("*.npz"))  # the reference was computed anew


def test_a_tampered_score_is_found_out_although_its_digest_fits(published, verified, tmp_path):
    def lower(content):
        content["report"]["metrics"]["fd_efficientnet_lite0_10"] *= 0.5
        content["report"]["errors"] = {}

    card = tampered(published, tmp_path / "card.json", lower)
    result, printed = call("verify", card, "--out", verified[0])
    assert result.exit_code == 1 and not printed["holds"]
    failed = [score["name"] for score in printed["scores"] if not score["holds"]]
    assert failed == ["fd_efficientnet_lite0_10"] and "NOT VERIFIED" in result.output


def refused(*words):
    with pytest.raises(InvalidInput) as error:
        result, _ = call(*words)
        raise result.exception
    return str(error.value)


def test_a_card_that_was_edited_is_refused(published, tmp_path):
    text = (published / "card.json").read_text()
    (tmp_path / "card.json").write_text(text.replace('"num_samples": 10', '"num_samples": 11'))
    assert "the card was edited" in refused("verify", tmp_path)


def test_another_checkpoint_is_refused(published, checkpoint, tmp_path):
    other = checkpoint.with_name("step_0000002")
    message = refused("verify", published, "--checkpoint", other, "--out", tmp_path / "own")
    assert f"expected {open_checkpoint(checkpoint).digest[:12]}, the one that was scored" in message
    assert not (tmp_path / "own").exists()


def test_another_reference_is_refused_and_named(published, output, tmp_path):
    images = shutil.copytree(output.images.path, tmp_path / "images")
    training, _ = open_source(output.images).listing().split(output.images.held_out)
    (Path(images) / training.keys[0]).unlink()
    message = refused("verify", published, "--set", f"images.path={images}", "--out", tmp_path / "own")
    assert "reference_digest = " in message and "num_samples" not in message


def test_a_checkpoint_that_has_moved_is_verified_where_it_lies(published, verified, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved" / "checkpoints" / checkpoint.name)
    shutil.copytree(checkpoint.parents[1] / "autoencoder", tmp_path / "moved" / "autoencoder")
    opened, config = cards.plan_verification(read(published), str(tmp_path / "own"), checkpoint=str(moved))
    assert opened.origin == str(moved) and config.output == str(tmp_path / "own")


def test_the_output_of_the_card_is_no_folder_of_its_own(published, output):
    assert "a folder of its own" in refused("verify", published, "--out", output.output)


def test_a_report_whose_settings_are_not_known_is_not_published(output, checkpoint, published):
    report = read(published).report
    other = replace(report, protocol=replace(report.protocol, reference_digest="f" * 64), repeats={})
    with pytest.raises(InvalidInput, match="--recipe and --set") as error:
        cards.make_card(other)
    assert "reference_digest" in error.value.found


def test_a_report_of_given_images_is_not_published(published):
    report = read(published).report
    given = replace(report, protocol=replace(report.protocol, sampler="unknown"))
    with pytest.raises(InvalidInput, match="a report of given images"):
        cards.make_card(given)


def test_a_card_holds_no_credentials(published, monkeypatch):
    report = read(published).report
    monkeypatch.setattr(cards, "environment_tags", lambda: {"hardware": "s3://user:password@host/x"})
    with pytest.raises(InvalidInput, match="environment.hardware: found a URI with a password"):
        cards.make_card(report)
