"""Which start a training finds that has begun: in another order of settings, damaged, frozen, or behind a link."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_training import Training, training_recipe

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.dataset import LatentDataset
from pipelines.training.starting.find_start import find_start
from pipelines.training.starting.identity import training_artifact
from raydit.errors import InvalidInput


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Training(training_recipe(tmp_path_factory.mktemp("base"), steps=3)).run().recipe


@pytest.fixture
def fine_tune(base, tmp_path):
    """Return a function that makes the recipe of a training from a copy of the base. settings: of [train.start]."""
    copy = shutil.copytree(CheckpointFolder(base.folder("checkpoints")).newest().path, tmp_path / "start")

    def make(name="tuned", **settings):
        start = {"checkpoint": str(copy), **settings}
        shared = {"encode": {"output": base.latents}, "start": start}
        return training_recipe(Path(base.output).parent, tmp_path / name, **shared)

    return make


def artifact_of(recipe):
    return training_artifact(recipe, LatentDataset.open(recipe.latents))


def test_the_order_of_what_is_reset_and_frozen_is_no_change(fine_tune):
    one = {"reset": ["labels", "final"], "freeze": ["blocks.0.*", "x_embedder.*"]}
    artifact_of(fine_tune(**one)).prepare()
    assert artifact_of(fine_tune(**{name: value[::-1] for name, value in one.items()})).changes() == []
    assert [line.split(":")[0] for line in artifact_of(fine_tune(**one | {"reset": ["final"]})).changes()] == [
        "start.reset"
    ]


def test_a_training_that_has_begun_resumes_without_a_damaged_start(fine_tune):
    recipe = Training(fine_tune()).run(stop_after=4).recipe
    artifact = artifact_of(recipe)
    Path(recipe.train.start.checkpoint, "config.json").write_text("{")
    found = find_start(recipe)
    assert found.opened is None and artifact_of(recipe).identity == artifact.identity
    with pytest.raises(InvalidInput, match="config.json"):
        found.require_opened()
    described = replace(recipe.train.start, objective="flow")
    with pytest.raises(InvalidInput, match="train.start.objective: found 'flow' without train.start.model"):
        find_start(replace(recipe, train=replace(recipe.train, start=described)))
    with pytest.raises(InvalidInput, match="config.json"):
        find_start(fine_tune("other"))  # has not begun


@pytest.mark.parametrize(
    ("reset", "freeze"), [("final", "final_layer.*"), ("embedding", "*embedder.proj.*"), ("labels", "y_embedder.*")]
)
def test_what_starts_anew_cannot_be_frozen(fine_tune, reset, freeze):
    frozen = {"freeze": ["blocks.0.*", freeze], "reset": [reset]}
    with pytest.raises(InvalidInput, match=r"train.start.freeze: found .*starts anew \(train.start.reset has"):
        Training(fine_tune(**frozen)).run()
    recipe = Training(fine_tune("begun", freeze=["blocks.0.*"], reset=[reset])).run(stop_after=4).recipe
    start = replace(recipe.train.start, freeze=("blocks.0.*", freeze))
    Training(replace(recipe, train=replace(recipe.train, start=start))).run()  # earlier commits began so


def test_a_start_in_the_trainings_own_folder_is_found_through_a_link(base, fine_tune, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(base.output)
    start = replace(fine_tune().train.start, checkpoint=str(link / "checkpoints" / "step_0000003"))
    with pytest.raises(InvalidInput, match="which this training would replace"):
        find_start(replace(base, train=replace(base.train, start=start)))
