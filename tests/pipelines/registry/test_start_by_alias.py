"""A training whose start is named by an alias of the model registry, which moves after the training began."""

import shutil
from dataclasses import replace

import pytest

from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.start import StartConfig
from pipelines.registry import promotion
from pipelines.training.starting.plan import plan_training
from pipelines.training.starting.training_start import write_first_checkpoint
from raydit.errors import NotFound

pytestmark = pytest.mark.usefixtures("store")
ALIAS = "models:/start@champion"


@pytest.fixture
def begun(story, store, tmp_path):
    """The recipe of a training that began with checkpoint 2, while the alias has moved on to checkpoint 4."""
    for step in (2, 4):
        promotion.promote_report(story.uri, story.config.name, "start", story.reports[step])
    versions = {version.tags["raydit.step"]: version.version for version in store.search_model_versions("name='start'")}
    store.set_registered_model_alias("start", "champion", versions["2"])
    shutil.copytree(story.config.folder("autoencoder"), tmp_path / "output" / "autoencoder")
    config = replace(
        story.config,
        output=str(tmp_path / "output"),
        encode=replace(story.config.encode, output=story.latents.path),
        train=replace(story.config.train, start=StartConfig(checkpoint=ALIAS), validate_every=None),
    )
    plan = plan_training(config, print)
    plan.artifact.prepare()
    write_first_checkpoint(plan.start, plan.worker_settings)
    store.set_registered_model_alias("start", "champion", versions["4"])
    return config


def test_it_resumes_with_the_checkpoint_that_it_began_with(story, begun):
    plan = plan_training(begun, print)
    assert open_checkpoint(ALIAS, tracking_uri=story.uri).step == 4
    assert plan.artifact.changes() == []
    assert plan.start.opened.step == 2
    assert plan.start.moved == (
        f"{ALIAS} is {story.checkpoints[4].path} now; this training began with {story.checkpoints[2].path}"
    )


def test_it_resumes_where_that_checkpoint_is_gone(story, begun, tmp_path):
    kept = shutil.move(story.checkpoints[2].path, tmp_path / "kept")
    try:
        plan = plan_training(begun, print)
        assert plan.artifact.changes() == [] and plan.start.opened is None
        with pytest.raises(NotFound, match="this training began with .*step_0000002, which is gone"):
            plan.start.require_opened()
    finally:
        shutil.move(kept, story.checkpoints[2].path)


def test_an_alias_may_move_to_the_training_itself(story, begun, monkeypatch):
    """As when a champion is tuned and the result is promoted."""
    own = CheckpointFolder(begun.folder("checkpoints")).open(0)
    trained = replace(own, files=own.files | {"ema.safetensors": "0" * 64})
    monkeypatch.setattr("pipelines.training.starting.find_start.open_start", lambda *arguments: trained)
    plan = plan_training(begun, print)
    assert plan.artifact.changes() == [] and plan.start.opened.step == 2
