"""Latents that changed on purpose: the newest checkpoint becomes the start of a new training, and is recorded."""

import shutil

import pytest
from tiny_training import Training, assert_equal, training_recipe, write_latents

from pipelines.artifacts import Artifact
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.dataset import LatentDataset
from pipelines.training.settings import train_worker_settings
from pipelines.training.starting.identity import training_artifact
from pipelines.training.starting.new_data import ACCEPTED, accepted_start, take_new_data
from pipelines.training.starting.prepare_checkpoints import prepare_checkpoints
from pipelines.training.starting.training_start import starting_from, write_first_checkpoint
from raydit.errors import NotFound


class Grown:
    """A finished training in a folder, whose latents were then made anew."""

    def __init__(self, folder, **train):
        self.recipe = training_recipe(folder, **train)
        self.checkpoints = CheckpointFolder(self.recipe.folder("checkpoints"))
        self.said = []
        prepare_checkpoints(Artifact("train", self.checkpoints.uri, self.identity()), 8)
        Training(self.recipe).run()
        self.trained = self.checkpoints.newest()
        self.before = self.latents.fingerprint
        write_latents(self.recipe, num_rows=60)

    @property
    def latents(self):
        return LatentDataset.open(self.recipe.latents)

    def identity(self, accept=False):
        training = training_artifact(self.recipe, self.latents)
        return (take_new_data(training, self.said.append) if accept else training).identity

    def begin(self, identity):
        """Do what the job does: move the earlier checkpoints away, and write the first one."""
        prepare_checkpoints(Artifact("train", self.checkpoints.uri, identity), 8)
        start = accepted_start(identity, self.checkpoints)
        settings = starting_from(train_worker_settings(self.recipe, self.latents), start, self.latents)
        write_first_checkpoint(start, settings)


@pytest.fixture
def grown(tmp_path):
    return Grown(tmp_path)


def test_the_newest_checkpoint_becomes_the_start_of_a_new_training(grown):
    averaged = grown.trained.weights("ema")
    identity = grown.identity(accept=True)
    sha256 = grown.trained.files["ema.safetensors"]
    accepted = {"checkpoint": "step_0000008", "digest": grown.trained.digest, "sha256": sha256, "latents": grown.before}
    assert identity[ACCEPTED] == accepted and identity["latents"]["fingerprint"] == grown.latents.fingerprint
    grown.begin(identity)
    first = grown.checkpoints.open(0)
    assert_equal(first.weights("ema"), averaged)
    assert_equal(first.weights("raw"), averaged)
    assert grown.checkpoints.finished_steps() == [0] and first.record.start["step"] == 8
    assert "superseded/checkpoints-1/step_0000008" in first.record.start["checkpoint"]
    assert first.record.latents_fingerprint == grown.latents.fingerprint


def test_the_same_command_resumes_with_or_without_the_flag_and_without_the_earlier_checkpoints(grown, tmp_path):
    identity = grown.identity(accept=True)
    prepare_checkpoints(Artifact("train", grown.checkpoints.uri, identity), 8)  # and then the process is killed
    assert grown.identity() == grown.identity(accept=True) == identity
    grown.begin(grown.identity())
    shutil.rmtree(tmp_path / "output" / "superseded")
    start = accepted_start(identity, grown.checkpoints)
    assert start.opened is None
    with pytest.raises(NotFound):
        other = Artifact("train", grown.checkpoints.uri, identity | {"seed": 9})
        prepare_checkpoints(other, 8, start.require_opened)
    assert grown.checkpoints.has_any()
    assert grown.identity() == identity == Artifact("train", grown.checkpoints.uri, {}).recorded()
    grown.checkpoints.remove(0)
    with pytest.raises(NotFound):
        accepted_start(identity, grown.checkpoints)


def test_without_the_flag_the_training_starts_over(grown):
    assert ACCEPTED not in grown.identity()
    grown.begin(grown.identity(accept=True))
    write_latents(grown.recipe, num_rows=54)
    assert ACCEPTED not in grown.identity()
    again = grown.identity(accept=True)[ACCEPTED]
    assert again["checkpoint"] == "step_0000000" and again["digest"] == grown.checkpoints.open(0).digest


def test_there_is_nothing_to_accept_where_the_latents_are_the_same(grown):
    write_latents(grown.recipe)
    identity = grown.identity()
    assert grown.identity(accept=True) == identity and ACCEPTED not in identity
    assert grown.said == ["there are no new data to accept: the latents are those of the checkpoints"]


def test_the_start_of_the_recipe_stays_in_the_identity_and_may_be_gone(grown, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(grown.trained.path, base)
    settings = {"start": {"checkpoint": str(base)}}
    tuned = Grown(tmp_path / "tuned", **settings)
    identity = tuned.identity(accept=True)
    assert identity["start"]["sha256"] == grown.trained.files["ema.safetensors"] and ACCEPTED in identity
    tuned.begin(identity)
    shutil.rmtree(base)
    assert tuned.identity() == identity
