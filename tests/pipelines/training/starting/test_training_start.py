"""A training that starts from a checkpoint: step 0, frozen parameters, rates, identity, resuming and refusals."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import Training, assert_equal, training_recipe, write_latents

from cluster import storage
from dit.checkpoint import restore
from dit.formats.completion import COMPLETE, write_completion
from dit.model import create_model
from pipelines.artifacts import Artifact, differences
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.lora import LoraConfig
from pipelines.config.reader import RecipeError, resolved, validate_recipe
from pipelines.latents.dataset import LatentDataset
from pipelines.registry.lineage import lineage
from pipelines.stage import StageContext
from pipelines.train import train
from pipelines.training.group.worker import Worker
from pipelines.training.loop import create_training_state
from pipelines.training.settings import train_worker_settings
from pipelines.training.starting.adapter import changed_names
from pipelines.training.starting.find_start import TrainingStart, find_start
from pipelines.training.starting.identity import train_identity
from pipelines.training.starting.prepare_checkpoints import prepare_checkpoints
from pipelines.training.starting.training_start import (
    changed_by_start,
    check_trained_parameters,
    describe_start,
    explain_scale,
    starting_from,
    target_model,
)
from raydit.errors import InvalidInput, NotFound, RayditError

CPU_WORKER = Worker(0, 1, torch.device("cpu"), lambda message: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished training, in a folder with its latents and autoencoder."""
    folder = tmp_path_factory.mktemp("base")
    return Training(training_recipe(folder)).run().recipe


def last_of(recipe):
    return CheckpointFolder(recipe.folder("checkpoints")).newest()


@pytest.fixture
def fine_tune(base, tmp_path):
    """Return a function that makes the recipe of a training from the base, on its latents, in another folder."""

    def make(name="tuned", model=None, **settings):
        start = {"checkpoint": str(last_of(base).path), **settings.pop("start", {})}
        folder = Path(base.output).parent
        shared = {"encode": {"output": base.latents}}
        return training_recipe(folder, tmp_path / name, model=model, **shared, start=start, **settings)

    return make


def identity_of(recipe):
    return train_identity(recipe, LatentDataset.open(recipe.latents), find_start(recipe))


def weights_at(recipe, step, which):
    return CheckpointFolder(recipe.folder("checkpoints")).open(step).weights(which)


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_step_0_holds_the_weights_of_the_start_to_the_bit(base, fine_tune, which):
    recipe = fine_tune(start={"weights": which}, ema_sigma_rels=[0.1])
    training = Training(recipe).run()
    checkpoints = CheckpointFolder(recipe.folder("checkpoints"))
    assert checkpoints.finished_steps() == [0, 3, 6, 8]
    expected = last_of(base).weights(which)
    for name in ("raw", "ema", "ema_0.1"):
        assert_equal(weights_at(recipe, 0, name), expected)
    first = checkpoints.open(0)
    assert first.step == 0 and first.trainer_state["batches"] == 0 == first.trainer_state["images_seen"]
    file = {"ema": "ema", "raw": "model"}[which]
    start = first.record.start
    assert start["sha256"] == last_of(base).files[f"{file}.safetensors"] and start["weights"] == which
    assert {fate: sorted(names) for fate, names in start["tensors"].items()} == {"equal": sorted(expected)}
    assert start["checkpoint"] == str(last_of(base).path)
    assert checkpoints.open(8).record.start == start
    assert list(training.losses) == list(range(1, 9))


def test_the_first_step_is_a_step_from_the_weights_of_the_start(base, fine_tune):
    """The loss of the first step, and with a learning rate near zero the weights after all of them, are the base's."""
    recipe = fine_tune(learning_rate=1e-30, start={"weights": "raw"})
    Training(recipe).run()
    assert_equal(weights_at(recipe, 8, "raw"), last_of(base).weights("raw"))
    assert_equal(weights_at(recipe, 8, "ema"), last_of(base).weights("raw"))


@pytest.mark.parametrize("stop", [4, 7])
def test_a_stopped_fine_tuning_resumes_to_the_bit_also_without_its_start(base, fine_tune, tmp_path, stop):
    start = {"checkpoint": str(tmp_path / "copy"), "freeze": ["blocks.0.*"]}
    shutil.copytree(last_of(base).path, tmp_path / "copy")
    settings = {"start": start, "lr_multipliers": {"final_layer.*": 3.0}, "layer_decay": 0.5}
    uninterrupted = Training(fine_tune("whole", **settings)).run()
    Training(fine_tune("parts", **settings)).run(stop_after=stop)
    shutil.rmtree(tmp_path / "copy")
    rest = Training(fine_tune("parts", **settings)).run()
    assert_equal(rest.weights, uninterrupted.weights)
    assert last_of(rest.recipe).record.start["sha256"] == last_of(base).files["ema.safetensors"]
    with pytest.raises(NotFound, match="no checkpoint at"):
        find_start(fine_tune("other", **settings))


def test_other_settings_without_the_start_move_nothing_and_the_earlier_ones_take_it_back(base, fine_tune, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(last_of(base).path, copy)
    recipe, other = (fine_tune(start={"checkpoint": str(copy)}, learning_rate=rate) for rate in (1e-3, 5e-4))
    identity, checkpoints = identity_of(recipe), CheckpointFolder(recipe.folder("checkpoints"))
    artifact = Artifact("train", checkpoints.uri, identity)
    prepare_checkpoints(artifact, 8)
    Training(recipe).run()
    digest, other_identity = last_of(recipe).digest, identity_of(other)
    shutil.rmtree(copy)
    shorter = replace(recipe, train=replace(recipe.train, steps=2))
    for changed in (other, shorter):
        with StageContext(changed) as context, pytest.raises(NotFound, match=f"no checkpoint at {copy}"):
            train(changed, context=context)
        assert last_of(recipe).digest == digest and not Path(recipe.folder("superseded")).exists()
    prepare_checkpoints(replace(artifact, identity=other_identity), 8)
    assert not checkpoints.has_any() and identity_of(recipe) == identity
    prepare_checkpoints(replace(artifact, identity=identity_of(recipe)), 8)
    assert last_of(recipe).digest == digest


def test_a_training_that_was_killed_after_step_0_goes_on_from_there(fine_tune):
    uninterrupted = Training(fine_tune("whole")).run()
    recipe = fine_tune("killed")
    Training(recipe).run(stop_after=1)
    for step in CheckpointFolder(recipe.folder("checkpoints")).interrupted_steps():
        CheckpointFolder(recipe.folder("checkpoints")).remove(step)
    assert last_of(recipe).step == 0
    assert_equal(Training(recipe).run().weights, uninterrupted.weights)


def test_frozen_parameters_stay_and_have_no_state_of_the_optimizer(base, fine_tune):
    recipe = fine_tune(start={"freeze": ["blocks.{0..1}.*", "{x,t}_embedder.*"], "weights": "raw"})
    Training(recipe).run()
    frozen = ("blocks.", "x_embedder.", "t_embedder.", "pos_embed")
    start = last_of(base).weights("raw")
    for which in ("raw", "ema"):
        found = weights_at(recipe, 8, which)
        changed = {name for name, tensor in found.items() if not torch.equal(tensor, start[name])}
        assert changed == {name for name in start if not name.startswith(frozen)}
    state = restore(create_training_state(settings_of(recipe), CPU_WORKER), last_of(recipe))
    names = {name for name, parameter in state.network.named_parameters() if parameter in state.optimizer.state}
    assert names == {name for name in start if not name.startswith(frozen)}
    says = check_trained_parameters(recipe.train, settings_of(recipe).model)
    trained = sum(tensor.numel() for name, tensor in start.items() if not name.startswith(frozen))
    assert says == f"{trained:,} of {sum(tensor.numel() for tensor in start.values()):,} parameters are trained"


def settings_of(recipe):
    return train_worker_settings(recipe, LatentDataset.open(recipe.latents))


def test_multipliers_scale_the_first_step_of_adam(base, fine_tune):
    """The first update of AdamW without decay is the learning rate times the sign of the gradient, nearly."""
    moved = {}
    for name, multipliers in {"plain": None, "scaled": {"final_layer.*": 0.25, "final_layer.linear.*": 0.5}}.items():
        recipe = fine_tune(name, steps=1, lr_multipliers=multipliers, start={"weights": "raw"})
        Training(recipe).run()
        after, before = weights_at(recipe, 1, "raw"), last_of(base).weights("raw")
        moved[name] = {key: after[key] - before[key] for key in after}
    for key, expected in moved["plain"].items():
        factor = 0.125 if key.startswith("final_layer.linear") else 0.25 if key.startswith("final_layer") else 1.0
        torch.testing.assert_close(moved["scaled"][key], factor * expected, rtol=1e-3, atol=1e-7)


def test_the_identity_has_the_digest_of_the_weights_and_not_where_they_lie(base, fine_tune, tmp_path):
    shutil.copytree(last_of(base).path, tmp_path / "elsewhere")
    here, there = identity_of(fine_tune()), identity_of(fine_tune(start={"checkpoint": str(tmp_path / "elsewhere")}))
    assert here == there and here["start"] == {"sha256": last_of(base).files["ema.safetensors"]}
    raw = identity_of(fine_tune(start={"weights": "raw", "freeze": ["blocks.0.*"]}))
    assert [line.split(":")[0] for line in differences(here, raw)] == ["start.freeze", "start.sha256"]
    scratch = train_identity(base, LatentDataset.open(base.latents))
    assert "start" not in scratch and "start" not in scratch["train"] and "start" not in here["train"]


def test_what_its_own_training_removes_is_no_base_of_an_adapter(fine_tune, tmp_path):
    stopped = CheckpointFolder(Training(fine_tune("stopped")).run(stop_after=4).recipe.folder("checkpoints"))
    assert stopped.interrupted_steps() == [4]
    start = {"checkpoint": stopped.uri_of(4)}
    assert find_start(fine_tune(start=start)).opened.interrupted
    recipe = fine_tune(start=start, lora={"rank": 2})
    with pytest.raises(InvalidInput, match=r"step_0000004: found the checkpoint of an interrupted .*copy the folder"):
        find_start(recipe)
    copy = shutil.copytree(stopped.uri_of(4), tmp_path / "copy")
    assert find_start(fine_tune("other", start={"checkpoint": str(copy)}, lora={"rank": 2})).opened.interrupted
    first = Path(CheckpointFolder(recipe.folder("checkpoints")).uri_of(0))
    first.mkdir(parents=True)
    write_completion(first, stopped.open(4).config | {"step": 0, "recipe": resolved(recipe)})
    assert find_start(recipe).opened.interrupted  # a training that has begun goes on


def test_the_identity_has_the_objective_of_a_file_where_it_decides_what_is_kept(base, fine_tune):
    opened, latents = last_of(base), LatentDataset.open(base.latents)

    def identity(objective, reset=("objective",), model="DiT-S/8"):
        settings = replace(fine_tune().train.start, model=model, objective=objective, reset=reset)
        return TrainingStart(settings, "0" * 64, opened.record, opened).identity(latents, "flow")

    plain = {"sha256": "0" * 64, "reset": ["objective"]}
    assert identity("flow") == plain == identity(None, model=None)
    assert identity("diffusion") == identity(None) == plain | {"objective": "diffusion"}
    assert "objective" not in identity("diffusion", ("labels",))


def test_classes_are_matched_by_name_and_other_latents_of_the_same_autoencoder_may_be_larger(base, fine_tune, tmp_path):
    recipe = replace(fine_tune(), encode=replace(base.encode, output=str(tmp_path / "larger")))
    write_latents(recipe, latent_side=8)
    training = Training(recipe).run()
    assert training.started is not None
    adapted = [fate.name for fate in training.started.fates if fate.fate == "adapted"]
    assert adapted == ["pos_embed"] and weights_at(recipe, 0, "ema")["pos_embed"].shape[1] == 16


@pytest.mark.slow  # the smallest named model has 33 million parameters
def test_an_official_file_is_a_start_if_its_size_and_objective_are_said(base, fine_tune, tmp_path):
    """A file of a named size; the recipe's autoencoder is taken to be its own."""
    torch.manual_seed(0)
    network = create_model("DiT-S/8", input_size=8, num_classes=3, learn_sigma=False)
    torch.save(network.state_dict(), tmp_path / "dit.pt")
    recipe = replace(
        fine_tune(model={"name": "DiT-S/8"}, start={"checkpoint": str(tmp_path / "dit.pt"), "model": "DiT-S/8"}),
        encode=replace(base.encode, output=str(tmp_path / "larger")),
    )
    write_latents(recipe, latent_side=8)
    with pytest.raises(InvalidInput, match=r"objective\.kind: found 'flow'.*train\.start\.objective"):
        Training(recipe).run()
    start = replace(recipe.train.start, objective="flow", reset=("labels",))
    recipe = replace(recipe, train=replace(recipe.train, steps=1, start=start))
    training = Training(recipe).run()
    fates = {fate.name: fate.fate for fate in training.started.fates}
    assert {name for name, fate in fates.items() if fate != "equal"} == {"y_embedder.embedding_table.weight"}
    last = str(Path(recipe.folder("checkpoints")) / "step_0000001")
    (link,) = [link for link in lineage(last) if link.kind == "start"]
    assert not link.broken and not link.unknown
    other = create_model("DiT-S/8", input_size=8, num_classes=3, learn_sigma=False)
    torch.save(other.state_dict(), tmp_path / "dit.pt")
    (link,) = [link for link in lineage(last) if link.kind == "start"]
    assert re.match("weights: found .*, expected", *link.broken)
    with pytest.raises(InvalidInput, match="a file, which does not record what it is of"):
        find_start(replace(recipe, train=replace(recipe.train, start=replace(start, model=None, objective=None))))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"checkpoint": None}, "train.start.checkpoint: missing"),
        ({"weights": "fast"}, "train.start.weights: found 'fast'"),
        ({"reset": ["blocks"]}, "train.start.reset: found 'blocks'"),
        ({"freeze": ["a", "a"]}, r"train.start.freeze: found \['a', 'a'\], expected each once"),
        ({"frozen": []}, r'unknown key \(did you mean "train.start.freeze"\?\)'),
    ],
)
def test_a_wrong_section_is_refused_by_its_key(start, message):
    content = {"name": "n", "output": "o", "images": {"path": "digits"}, "autoencoder": {"id": "a"}}
    content |= {"model": {"name": "DiT-S/2"}, "train": {"start": {"checkpoint": "c", **start}}}
    with pytest.raises(RecipeError, match=message):
        validate_recipe(content)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": {"freeze": ["block.*"]}}, r"train\.start\.freeze: found 'block\.\*'.*such as 'blocks"),
        ({"start": {"freeze": ["blocks.{0..2}.*"]}}, r"found 'blocks\.2\.\*', one of 'blocks\.\{0\.\.2\}"),
        ({"start": {"freeze": ["blocks.{0..99999999999}.*"]}}, r"found 'blocks\.2\.\*', one of 'blocks\.\{0\.\.9"),
        ({"start": {"freeze": ["blocks.{1..0}.*"]}}, r"train\.start\.freeze: .* counts down.*Write \{0\.\.1\}$"),
        ({"lr_multipliers": {"blocks.{0..1.}.*": 2.0}}, r"train\.lr_multipliers: found the range \{0\.\.1\.\}"),
        ({"start": {"freeze": ["*"]}}, "freezes all parameters"),
        ({"lr_multipliers": {"final": 2.0}}, r"train\.lr_multipliers: found 'final'.*'final_layer\.\*'"),
        ({"lr_multipliers": {"pos_*": 2.0}}, r"found 'pos_\*', which matches none of the trained \d+ parameters"),
        (
            {"lr_multipliers": {"final_layer.*": 2.0}, "start": {"freeze": ["final_layer.*"]}},
            r"found 'final_layer\.\*', which matches none of the trained \d+ parameters",
        ),
    ],
)
def test_patterns_that_match_nothing_and_freezing_everything_are_refused(fine_tune, settings, message):
    recipe = fine_tune(**settings)
    with pytest.raises(InvalidInput, match=message):
        check_trained_parameters(recipe.train, settings_of(recipe).model)


def test_what_a_start_changes_is_known_without_its_weights(base, fine_tune):
    """An adapter's checkpoints hold it, and its rates may be chosen."""
    recipe = fine_tune(
        start={"reset": ["labels"]}, model={"patch_size": 1, "hidden_size": 16, "depth": 3, "num_heads": 2}
    )
    started = Training(recipe).run(stop_after=1).started
    start, settings = find_start(recipe), replace(recipe.train, lora=LoraConfig(rank=2))
    model = target_model(starting_from(settings_of(recipe), start, LatentDataset.open(recipe.latents)))
    expected = changed_names(started.fates)
    assert {"y_embedder.embedding_table.weight", "pos_embed", "x_embedder.proj.weight"} <= {*expected}
    assert changed_by_start(start, settings, model) == expected
    gone = replace(start, opened=None, record=last_of(recipe).record)
    assert sorted(changed_by_start(gone, settings, model)) == sorted(expected)
    assert changed_by_start(start, recipe.train, model) == []


def test_the_scale_of_the_latents_is_that_of_the_start(base, fine_tune, tmp_path):
    """As where an autoencoder was imported with another scaling factor than its own config has."""
    copy = tmp_path / "copy"
    shutil.copytree(last_of(base).path, copy)
    config = last_of(base).config
    (copy / COMPLETE).unlink()
    twice = {"latents_std": [2 * value for value in config["autoencoder"]["latents_std"]]}
    write_completion(copy, config | {"autoencoder": config["autoencoder"] | twice})
    recipe = fine_tune(start={"checkpoint": str(copy)})
    training = Training(recipe).run()
    assert last_of(recipe).record.autoencoder.latents_std == tuple(twice["latents_std"])
    assert identity_of(recipe)["start"]["scale"]["std"] == twice["latents_std"]
    assert training.losses != Training(fine_tune("own")).run().losses
    scale, latents = last_of(recipe).record.autoencoder.scale, LatentDataset.open(recipe.latents)
    assert "scaled as those of the start" in explain_scale(scale, latents)
    assert explain_scale(last_of(base).record.autoencoder.scale, latents) == ""
    first, *groups = describe_start(find_start(recipe), training.started)
    assert first.startswith(f"starts from {copy}, step 8, 'ema' weights") and len(groups) == 6


def test_a_start_in_another_store_is_the_same_start(base, fine_tune, s3_bucket, tmp_path):
    shutil.copytree(last_of(base).path, tmp_path / "copy")
    storage.publish_folder(str(tmp_path / "copy"), f"{s3_bucket}/base/step_0000008", last=COMPLETE)
    remote = fine_tune(start={"checkpoint": f"{s3_bucket}/base/step_0000008"})
    assert identity_of(remote) == identity_of(fine_tune())
    Training(remote).run()
    assert last_of(remote).record.start["checkpoint"] == f"{s3_bucket}/base/step_0000008"


def missing(folder):
    return {"checkpoint": str(folder / "nothing")}


def unfinished(folder):
    (folder / "step_0000001").mkdir()
    return {"checkpoint": str(folder / "step_0000001")}


def without_size(folder):
    torch.save({}, folder / "dit.pt")
    return {"checkpoint": str(folder / "dit.pt")}


def text(folder):
    (folder / "dit.pt").write_text("no weights")
    return {"checkpoint": str(folder / "dit.pt"), "model": "DiT-S/2"}


def other_network(folder):
    torch.save({"layer.weight": torch.zeros(2)}, folder / "dit.pt")
    return {"checkpoint": str(folder / "dit.pt"), "model": "DiT-S/2"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "no checkpoint at"),
        (unfinished, "is not a finished checkpoint"),
        (without_size, "train.start.checkpoint: found .*dit.pt, a file.*Set train.start.model"),
        (text, "cannot be read"),
        (other_network, "neither those of a DiT nor of a U-ViT"),
        (lambda folder: {"model": "DiT-S/2"}, "train.start.model: found 'DiT-S/2' with .*which records its model"),
        (lambda folder: {"objective": "flow"}, "train.start.objective: found 'flow' without train.start.model"),
        (lambda folder: {"checkpoint": "runs:/0123"}, "no MLflow store"),
    ],
)
def test_what_is_no_start_is_refused(fine_tune, tmp_path, make, message):
    with pytest.raises(RayditError, match=message):
        find_start(fine_tune(start=make(tmp_path)))


def test_a_checkpoint_that_the_training_would_replace_is_refused(base, fine_tune):
    with pytest.raises(InvalidInput, match="which this training would replace"):
        find_start(replace(base, train=fine_tune().train))


def test_another_autoencoder_is_refused_unless_both_ends_are_reset(fine_tune, tmp_path):
    other = training_recipe(tmp_path / "other")
    own = str(Path(other.autoencoder.id) / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in load_file(own).items()}, own)
    shutil.rmtree(other.latents)
    write_latents(other)
    tuned = fine_tune()
    recipe = replace(other, train=tuned.train)
    with pytest.raises(InvalidInput, match=r'trained on latents of the autoencoder.*reset = \["embedding", "final"\]'):
        Training(recipe).run()
    start = replace(tuned.train.start, reset=("embedding", "final"))
    Training(replace(recipe, train=replace(tuned.train, start=start, steps=1))).run()
