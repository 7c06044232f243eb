"""What the train job resumes from: stopped at what is now its end, or with damaged checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from fakes import FakeContext
from tiny_training import Training, assert_equal, final_weights, training_recipe

from cluster import storage
from dit.formats.digests import require_recorded
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.dataset import LatentDataset
from pipelines.registry.cleaning import _configs
from pipelines.train import train
from pipelines.training.group.messages import Notice
from pipelines.training.group.worker import Worker
from pipelines.training.starting.damage import set_aside_damaged
from pipelines.training.starting.identity import training_artifact
from pipelines.training.starting.prepare_checkpoints import prepare_checkpoints


class Context(FakeContext):
    """A context in which workers find what they need."""

    def prepare_work(self, workers, stage): ...


def run_worker(context, stage, workers, function, settings, on_message, *, ray_folder):
    """`pipelines.training.group.run_workers.run_workers` with one worker, in this process."""
    messages = []
    function(Worker(0, 1, torch.device("cpu"), messages.append), settings)
    for message in messages:
        if isinstance(message, Notice):
            context.say(stage, message.text)
        elif hasattr(message, "step"):
            on_message(message)


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    monkeypatch.setattr("pipelines.train.run_workers", run_worker)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder whose training was stopped after 5 of 8 steps, with a regular checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = training_recipe(folder)
    prepare_checkpoints(training_artifact(recipe, LatentDataset.open(recipe.latents)), 8)
    Training(recipe).run(stop_after=5)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy, whose recipe has its absolute paths."""
    shutil.copytree(stopped / "autoencoder", tmp_path / "autoencoder")
    shutil.copytree(stopped / "output", tmp_path / "output")
    return tmp_path


def damage(file, change):
    """Damage a file: change its last byte, cut it, or remove it."""
    content = file.read_bytes()
    if change == "absent":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1]))


def test_a_training_that_was_stopped_at_what_is_now_its_end_is_finished(folder, capsys):
    recipe = training_recipe(folder, steps=5)
    assert train(recipe, context=Context()).step == 5
    assert CheckpointFolder(recipe.folder("checkpoints")).finished_steps() == [3, 5]
    said = capsys.readouterr().out
    assert "training was stopped after step 5, which is now its last step" in said and "5 steps, " in said
    train(recipe, context=Context())
    assert "already finished: 5 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "kept", "beyond"), [(6, [3, 6], [8]), (5, [3, 5], [6, 8])])
def test_a_shorter_training_goes_on_from_a_checkpoint_on_its_way(tmp_path, capsys, steps, kept, beyond):
    train(training_recipe(tmp_path), context=Context())
    shorter = training_recipe(tmp_path, steps=steps)
    capsys.readouterr()
    assert train(shorter, context=Context()).step == steps
    said = capsys.readouterr().out
    assert CheckpointFolder(shorter.folder("checkpoints")).finished_steps() == kept
    aside = CheckpointFolder(str(tmp_path / "output" / "superseded" / "checkpoints-1"))
    assert aside.finished_steps() == beyond
    for step in beyond:
        assert f"the checkpoint of step {step}, beyond train.steps = {steps}, is kept in {aside.uri_of(step)}" in said
    assert "starts again" not in said
    whole = Training(training_recipe(tmp_path / "whole", steps=steps)).run()
    assert_equal(final_weights(shorter), whole.weights)
    train(shorter, context=Context())
    assert f"already finished: {steps} steps" in capsys.readouterr().out
    longer = training_recipe(tmp_path)
    assert train(longer, context=Context()).step == 8
    assert_equal(final_weights(longer), Training(training_recipe(tmp_path / "all")).run().weights)


def test_a_shorter_training_with_other_rates_begins_anew(tmp_path, capsys):
    train(training_recipe(tmp_path, lr_schedule="linear"), context=Context())
    shorter = training_recipe(tmp_path, lr_schedule="linear", steps=6)
    assert train(shorter, context=Context()).step == 6
    assert "starts again, because train.steps: 8 -> 6." in capsys.readouterr().out
    whole = Training(training_recipe(tmp_path / "whole", lr_schedule="linear", steps=6)).run()
    assert_equal(final_weights(shorter), whole.weights)


def test_a_training_resumes_from_the_newest_checkpoint_that_is_not_damaged(folder, tmp_path, capsys):
    recipe = training_recipe(folder)
    broken = Path(recipe.folder("checkpoints")) / "step_0000005"
    damage(broken / "model.safetensors", "changed")
    content = (broken / "model.safetensors").read_bytes()
    assert train(recipe, context=Context()).step == 8
    said = capsys.readouterr().out
    kept = folder / "output" / "superseded" / "checkpoints-1" / "damaged_step_0000005"
    assert "the checkpoint of step 5 is damaged" in said and "model.safetensors: the file changed after" in said
    assert f"it is kept in {kept}" in said and "resumes from step 3" in said
    assert (kept / "model.safetensors").read_bytes() == content and list(_configs(str(kept.parent))) == []
    whole = Training(training_recipe(tmp_path / "whole")).run()
    assert_equal(final_weights(recipe), whole.weights)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("COMPLETE", "cut"),
        ("config.json", "absent"),
        ("trainer/optimizer.safetensors", "cut"),
        ("INTERRUPTED", "absent"),
    ],
)
def test_every_damage_is_found(folder, name, change):
    checkpoints, said = CheckpointFolder(str(folder / "output" / "checkpoints")), []
    set_aside_damaged(checkpoints, said.append)
    assert said == [] and checkpoints.last_step() == 5
    damage(Path(checkpoints.uri_of(5)) / name, change)
    set_aside_damaged(checkpoints, said.append)
    assert checkpoints.last_step() == 3 and len(said) == 1 and name in said[0]


def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_damaged(folder, monkeypatch):
    """By workers of a killed driver, once they have written the next one."""
    checkpoints, said = CheckpointFolder(str(folder / "output" / "checkpoints")), []

    def remove_and_read(path, name, digests):
        checkpoints.remove(5)
        require_recorded(path, name, digests)

    monkeypatch.setattr("pipelines.checkpoints.folder.require_recorded", remove_and_read)
    set_aside_damaged(checkpoints, said.append)
    assert said == [] and checkpoints.last_step() == 3 and not (folder / "output" / "superseded").exists()


def test_a_training_with_damaged_checkpoints_alone_is_refused_and_nothing_is_moved(folder):
    recipe = training_recipe(folder)
    checkpoints = CheckpointFolder(recipe.folder("checkpoints"))
    for step in (3, 5):
        damage(Path(checkpoints.uri_of(step)) / "ema.safetensors", "cut")
    with pytest.raises(ValueError, match=r"step 5 is damaged \(.*ema.safetensors.*so are all before.*0, mv .*-damaged"):
        train(recipe, context=Context())
    assert (checkpoints.finished_steps(), checkpoints.interrupted_steps()) == ([3], [5])


def test_a_damaged_checkpoint_in_a_bucket_is_moved(s3_bucket, folder):
    checkpoints, said = CheckpointFolder(f"{s3_bucket}/output/checkpoints"), []
    local = CheckpointFolder(str(folder / "output" / "checkpoints"))
    for step in (3, 5):
        checkpoints.publish(local.uri_of(step), step)
    storage.remove_file(storage.join(checkpoints.uri_of(5), "trainer/optimizer.safetensors"))
    set_aside_damaged(checkpoints, said.append)
    assert checkpoints.last_step() == 3 and "lacks trainer/optimizer.safetensors" in said[0]
    assert storage.exists(f"{s3_bucket}/output/superseded/checkpoints-1/damaged_step_0000005/COMPLETE")
