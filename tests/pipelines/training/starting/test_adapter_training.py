"""Trainings of an adapter: step 0, exact resume, what is trained and kept, the base, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import Training, assert_equal, training_recipe

from dit.formats.weights import load_weights
from dit.model import build_model
from pipelines.checkpoints.adapters import import_adapter, merge_checkpoints
from pipelines.checkpoints.exporting import export_checkpoint
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.reader import RecipeError
from pipelines.latents.dataset import LatentDataset
from pipelines.registry.lineage import lineage
from pipelines.training.starting.find_start import find_start
from pipelines.training.starting.identity import train_identity
from pipelines.training.starting.training_start import check_trained_parameters
from raydit.errors import InvalidInput, NotFound

peft = pytest.importorskip("peft")
TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished training, in a folder with its latents and autoencoder."""
    folder = tmp_path_factory.mktemp("base")
    return Training(training_recipe(folder)).run().recipe


def last_of(recipe):
    return CheckpointFolder(recipe.folder("checkpoints")).newest()


@pytest.fixture
def adapt(base, tmp_path):
    """adapt(name, **settings of [train]): the recipe of a training of an adapter of the base, in another folder."""

    def make(name="adapted", lora=None, start=None, **settings):
        start = {"checkpoint": str(last_of(base).path), **(start or {})}
        lora = {"rank": 2, **(lora or {})}
        shared = {"encode": {"output": base.latents}, "start": start, "lora": lora}
        return training_recipe(Path(base.output).parent, tmp_path / name, **shared, **settings)

    return make


def step(recipe, number):
    return CheckpointFolder(recipe.folder("checkpoints")).open(number)


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_step_0_computes_what_the_base_does_to_the_bit(base, adapt, which):
    recipe = adapt(start={"weights": which}, ema_sigma_rels=[0.1])
    training = Training(recipe).run()
    first, expected = step(recipe, 0), last_of(base).weights(which)
    for name in ("raw", "ema", "ema_0.1"):
        assert_equal(first.weights(name), expected)
    kept = {file.relative_to(first.path).parts[0] for file in first.path.rglob("*") if file.is_file()}
    assert kept == {"adapter", "adapter_ema", "adapter_ema_0.1", "trainer", "config.json", "COMPLETE"}
    file = {"ema": "ema.safetensors", "raw": "model.safetensors"}[which]
    assert first.config["base"] == {
        "uri": str(last_of(base).path),
        "file": file,
        "sha256": last_of(base).files[file],
        "digest": last_of(base).digest,
    }
    assert list(training.losses) == list(range(1, 9))


def test_only_factors_are_trained_and_the_rest_stays_that_of_the_base(base, adapt):
    recipe = adapt(lora={"targets": ["attention", "mlp"]})
    Training(recipe).run()
    trained, expected = step(recipe, 8).weights("raw"), last_of(base).weights("ema")
    changed = {name for name, value in trained.items() if not torch.equal(value, expected[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    optimizer = load_file(step(recipe, 8).path / "trainer" / "optimizer.safetensors")
    assert {name.split("/")[1].split(".lora_")[0] for name in optimizer} == {
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers
    }
    averaged = step(recipe, 8).weights("ema")
    assert any(not torch.equal(value, trained[name]) for name, value in averaged.items())


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_training_resumes_to_the_bit(adapt, stop):
    multipliers = {"*.lora_B.*": 3.0, "y_embedder.*": 2.0}
    settings = {"lr_multipliers": multipliers, "layer_decay": 0.9, "start": {"reset": ["labels"]}}
    uninterrupted = Training(adapt("whole", **settings)).run()
    Training(adapt("parts", **settings)).run(stop_after=stop)
    rest = Training(adapt("parts", **settings)).run()
    assert_equal(rest.weights, uninterrupted.weights)
    assert_equal(step(rest.recipe, 8).weights(), step(uninterrupted.recipe, 8).weights())


def test_alpha_zero_stays_the_base_to_the_bit(base, adapt):
    recipe = adapt(lora={"alpha": 0, "targets": ["attention", "modulation"]})
    Training(recipe).run()
    for which in ("raw", "ema"):
        assert_equal(step(recipe, 8).weights(which), last_of(base).weights("ema"))


def test_what_the_start_changes_is_trained_in_full(base, adapt, tmp_path):
    recipe = adapt(start={"reset": ["labels"]})
    Training(recipe).run()
    first, last = step(recipe, 0), step(recipe, 8)
    assert TABLE in first.record.start["tensors"]["fresh"]
    assert not torch.equal(first.weights()[TABLE], last_of(base).weights()[TABLE])
    assert not torch.equal(first.weights("raw")[TABLE], last.weights("raw")[TABLE])
    config = json.loads((last.path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["y_embedder.embedding_table"]
    folder = export_checkpoint(last, tmp_path / "peft", format="peft")
    network = load_weights(build_model(last.record.model_config), last.unadapted_weights() | dict(last.adapter().full))
    theirs = peft.PeftModel.from_pretrained(network, folder).merge_and_unload()
    weights = last.weights()
    assert theirs.state_dict().keys() == weights.keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, weights[name])
    imported = import_adapter(folder, tmp_path / "imported", last_of(base))
    assert imported.record.class_names == ("a", "b", "c")
    assert_equal(imported.weights(), weights)


def test_other_positions_are_kept_beside_the_adapter(base, adapt, tmp_path):
    """Sine-cosine positions are never trained, and those of another grid are not the base's."""
    model = {"patch_size": 1, "hidden_size": 16, "depth": 3, "num_heads": 2}
    recipe = adapt(model=model)
    Training(recipe).run()
    last = step(recipe, 8)
    assert load_file(last.path / "frozen.safetensors").keys() == {"pos_embed"}
    weights = last.weights()
    network = load_weights(build_model(last.record.model_config), weights)
    assert torch.equal(weights["pos_embed"], build_model(last.record.model_config).pos_embed)
    assert network.config.depth == 3 and weights.keys() == network.state_dict().keys()
    merged = merge_checkpoints([(last, 1.0)], tmp_path / "merged")
    assert_equal(merged.weights(), weights)


def test_peft_loads_a_trained_adapter_onto_the_base(adapt):
    recipe = adapt(lora={"targets": ["attention", "mlp", "modulation"], "alpha": 5})
    Training(recipe).run()
    last = step(recipe, 8)
    network = load_weights(build_model(last.record.model_config), last.unadapted_weights())
    theirs = peft.PeftModel.from_pretrained(network, last.path / "adapter").eval()
    ours = load_weights(build_model(last.record.model_config), last.weights("raw")).eval()
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, y), atol=1e-5, rtol=1e-5)


def test_a_training_needs_its_base_and_no_other(adapt, base, tmp_path):
    copy = shutil.copytree(last_of(base).path, tmp_path / "copy")
    recipe = adapt(start={"checkpoint": str(copy)})
    Training(recipe).run(stop_after=4)
    weights = load_file(copy / "ema.safetensors")
    shutil.rmtree(copy)
    with pytest.raises(NotFound, match=r"its base is gone: no ema.safetensors of sha256"):
        Training(recipe).run()
    shutil.copytree(step(recipe, 0).path, copy)  # another checkpoint in its place
    with pytest.raises(InvalidInput, match="found an adapter as the base of another|its base at .* has changed"):
        Training(recipe).run()
    save_file(weights, step(recipe, 4).path / "base.safetensors")
    shutil.rmtree(copy)
    assert Training(recipe).run().losses[8]


def test_the_adapter_is_part_of_the_identity(adapt):
    def identity(recipe):
        return train_identity(recipe, LatentDataset.open(recipe.latents), find_start(recipe))

    one, other = adapt(), adapt(lora={"rank": 3})
    assert identity(one)["train"]["lora"]["rank"] == 2 and identity(one) != identity(other)
    assert identity(one) == identity(adapt("elsewhere"))


def test_a_plain_training_starts_from_a_checkpoint_with_an_adapter(adapt, base, tmp_path):
    recipe = adapt()
    Training(recipe).run()
    start = {"checkpoint": str(step(recipe, 8).path)}
    tuned = training_recipe(Path(base.output).parent, tmp_path / "tuned", encode={"output": base.latents}, start=start)
    Training(tuned).run()
    assert_equal(step(tuned, 0).weights(), step(recipe, 8).weights())
    links = {link.kind: link for link in lineage(str(step(tuned, 8).path))}
    assert not links["start"].broken and not links["start"].unknown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 17}}, "train.lora.rank: found 17, expected at most 16"),
        ({"lora": {"targets": ["convolution"]}}, "train.lora.targets: found 'convolution'"),
        ({"lora": {"targets": ["blocks.{0..2}.mlp.*"]}}, "train.lora.targets: found 'blocks.2.mlp"),
        ({"lora": {"targets": ["blocks.{1..0}.mlp.*"]}}, "train.lora.targets: found the range .1..0.*counts down"),
        ({"lr_multipliers": {"*.lora_C.*": 2.0}}, "train.lr_multipliers"),
        ({"lr_multipliers": {"blocks.*.attn.qkv.weight": 2.0}}, "none of the trained 8 parameters"),
        ({"lr_multipliers": {"final_layer.*": 2.0}}, "none of the trained 8 parameters"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_work(adapt, settings, message):
    recipe = adapt(**settings)
    model = build_model_config(recipe)
    with pytest.raises(InvalidInput, match=message):
        check_trained_parameters(recipe.train, model)


def build_model_config(recipe):
    from pipelines.training.settings import train_worker_settings

    return train_worker_settings(recipe, LatentDataset.open(recipe.latents)).model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 0}}, "train.lora.rank"),
        ({"lora": {"alpha": -1}}, "train.lora.alpha"),
        ({"lora": {"targets": ["mlp", "mlp"]}}, "each once"),
        ({"lora": {"ranks": 4}}, "ranks"),
        ({"start": {"freeze": ["blocks.*"]}}, "although an adapter's base is frozen anyway"),
        (
            {"matmul": "float8", "dtype": "bfloat16", "gpus_per_worker": 1},
            "found with matmul = 'float8', for which the layers of adapters are not made",
        ),
    ],
)
def test_settings_that_contradict_an_adapter_are_refused(adapt, settings, message):
    with pytest.raises((RecipeError, InvalidInput), match=message):
        adapt(**settings)


def test_an_adapter_needs_a_start(tmp_path):
    with pytest.raises((RecipeError, InvalidInput), match="lora: found without start"):
        training_recipe(tmp_path, lora={"rank": 2})
