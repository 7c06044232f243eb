"""A checkpoint without a recipe is evaluated by that of others, whose output has its report: promotion is given it."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_story import tell_evaluation, tell_story

from dit.formats.completion import write_completion
from pipelines.checkpoints.open import open_checkpoint
from pipelines.scoring.reports.report_files import find_report_files, read_report_of
from pipelines.stage import StageContext
from raydit.errors import NotFound


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One of its own, because these tests add an experiment to its store."""
    return tell_story(tmp_path_factory.mktemp("story"))


@pytest.fixture
def evaluated(story, store, tmp_path):
    """An imported checkpoint, and the report on it in the output of another recipe."""
    folder = shutil.copytree(story.checkpoints[4].path, tmp_path / "alone" / "imported")
    content = json.loads((folder / "config.json").read_text())
    content |= {"recipe": None, "source": {"format": "official", "name": "weights.pt"}, "seed": 3}
    content["autoencoder"]["id"] = f"{story.config.output}/autoencoder"
    write_completion(folder, content)
    config = replace(story.config, name="imports", output=str(tmp_path / "output"))
    with StageContext(config) as context:
        tell_evaluation(context, config, open_checkpoint(folder), 17.0)
    (report,) = find_report_files(f"{config.output}/evaluations", None, "imported")
    return str(folder), report


def test_a_checkpoint_is_promoted_by_its_report_in_the_output_of_another_recipe(raydit, evaluated):
    folder, report = evaluated
    code, _, err = raydit("promote", folder, "--name", "of-imports")
    assert code == 2 and "no report in" in err and "--protocol REPORT.json" in err
    assert "raydit evaluate" in err and "--recipe RECIPE" in err
    code, out, err = raydit("promote", folder, "--name", "of-imports", "--protocol", report, "--json")
    assert (code, err) == (0, ""), err
    assert json.loads(out.splitlines()[-1])["given"] and "models:/of-imports@champion is now version 1: 17" in out
    assert open_checkpoint("models:/of-imports@champion").digest == open_checkpoint(folder).digest


def test_a_report_of_another_checkpoint_only_names_the_protocol(story, evaluated):
    """As a file that `raydit tune` wrote does, too."""
    folder, report = evaluated
    assert read_report_of(report, story.checkpoints[4].digest) is None
    found = read_report_of(report, open_checkpoint(folder).digest)
    assert found is not None and found.metrics[found.headline] == 17.0
    with pytest.raises(NotFound, match="no report at nowhere.json"):
        read_report_of("nowhere.json", "")
