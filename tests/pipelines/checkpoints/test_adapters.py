"""Checkpoints that hold an adapter and refer to their base: used like any other, merged, exported and imported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from tiny_adapter import LAYERS, write_factors
from tiny_checkpoint import MODEL, tiny_output, write_checkpoint

from dit.checkpoint import load_checkpoint, verify_checkpoint
from dit.formats.adapter import merge_adapters, read_adapter
from dit.formats.adapter_diffusers import adapter_for_diffusers, adapter_from_diffusers
from dit.formats.completion import write_completion
from dit.formats.weights import load_weights
from dit.model import build_model
from pipelines.checkpoints.adapters import export_adapter, import_adapter, merge_checkpoints
from pipelines.checkpoints.exporting import export_checkpoint
from pipelines.checkpoints.open import open_checkpoint
from pipelines.registry.cleaning import inspect_superseded
from pipelines.registry.model_files import gather
from pipelines.registry.promotion import promote
from pipelines.registry.promotion_score import PromotionScore
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, sampling_protocol
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.tracking.bases import base_digests
from pipelines.training.monitoring.retention import ProtectedCheckpoints
from raydit.errors import InvalidInput, NotFound

TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture
def base(tmp_path):
    """A checkpoint of the tiny recipe."""
    return write_checkpoint(tiny_output(tmp_path), 2)


@pytest.fixture
def adapted(base, tmp_path):
    """adapted(seed, **options): a checkpoint with a random adapter of the base."""

    def make(seed=0, **options):
        folder = write_factors(tmp_path / f"factors-{seed}", seed, **options)
        return open_checkpoint(import_adapter(folder, tmp_path / f"adapted-{seed}", base.path).path)

    return make


def samples(opened, **options):
    config = checkpoint_recipe(opened)
    protocol = sampling_protocol(config.evaluate, config.seed, opened, config.random)
    return CheckpointSampler(opened.shared, protocol, batch_size=2, **options).sample([0, 1], np.array([1, 2]))


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_checkpoint_with_an_adapter_is_small_and_samples_as_the_merged_weights_do(adapted, base, tmp_path):
    opened = adapted()
    verify_checkpoint(opened)
    files = {file.relative_to(opened.path).as_posix() for file in opened.path.rglob("*") if file.is_file()}
    pair = ("adapter_config.json", "adapter_model.safetensors")
    assert files == {
        "config.json",
        "COMPLETE",
        *(f"{folder}/{name}" for folder in ("adapter", "adapter_ema") for name in pair),
    }
    recorded = opened.config["base"]
    assert recorded["uri"] == str(base.path) and recorded["sha256"] == base.files["ema.safetensors"]
    expected = merge_adapters(base.weights("ema"), [(read_adapter(tmp_path / "factors-0"), 1.0)])
    assert equal(opened.weights(), expected) and equal(load_checkpoint(opened.path).weights("raw"), expected)
    assert not equal(base.weights(), expected)
    assert opened.weights_sha256() != base.weights_sha256()
    merged = open_checkpoint(merge_checkpoints([(opened, 1.0)], tmp_path / "merged").path)
    assert equal(merged.weights(), expected) and merged.base is None
    assert (samples(opened) == samples(merged)).all() and (samples(opened) != samples(open_checkpoint(base.path))).any()


def test_a_base_is_found_in_a_copy_and_refused_where_it_changed_or_is_gone(adapted, base, tmp_path):
    opened = adapted()
    expected, weights = opened.weights(), base.path / "ema.safetensors"
    base.path.rename(tmp_path / "gone")
    for each in (opened, load_checkpoint(opened.path)):
        with pytest.raises(NotFound, match=r"its base is gone: no ema.safetensors of sha256 .* at .*step_0000002"):
            each.weights()
    shutil.copy(tmp_path / "gone" / "ema.safetensors", opened.path / "base.safetensors")
    assert equal(opened.weights(), expected)
    save_file({name: value + 1 for name, value in expected.items()}, opened.path / "base.safetensors")
    with pytest.raises(InvalidInput, match=r"base.safetensors: found weights .*, expected .* those of the base"):
        opened.weights()
    (opened.path / "base.safetensors").unlink()
    shutil.copytree(write_checkpoint(tiny_output(tmp_path / "other"), 3).path, base.path)
    with pytest.raises(InvalidInput, match=r"holds an adapter, and its base at .* has changed"):
        opened.weights()
    assert weights.exists()


def test_a_base_in_another_format_is_found_by_open_checkpoint_alone(raydit, base, tmp_path):
    weights = export_checkpoint(open_checkpoint(base.path), tmp_path / "base.safetensors", format="official")
    factors, out = write_factors(tmp_path / "factors", 0), tmp_path / "out"
    described = (
        "--set",
        "model.num_heads=2",
        "--objective",
        "flow",
        "--autoencoder",
        f"{base.path.parents[1]}/autoencoder",
    )
    code, _, err = raydit("import", str(factors), str(out), "--base", str(weights), *described)
    assert (code, err) == (0, "")
    opened = open_checkpoint(out)
    assert equal(opened.weights(), merge_adapters(base.weights(), [(read_adapter(factors), 1.0)]))
    assert opened.record.process_kind == "flow" and opened.record.model_config.num_heads == 2
    with pytest.raises(NotFound, match=r"base.safetensors is no folder .* pipelines.checkpoints.open.open_checkpoint"):
        load_checkpoint(out).weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "DiT-S/8"], "--model DiT-S/8: found with"),
        (["--set", "model.num_heads=2"], "which records what it is of"),
        (["--objective", "flow"], "which records what it is of"),
        (["--numerics", "official"], "--numerics cannot be combined with --base"),
    ],
)
def test_what_a_base_records_is_not_asked_for(raydit, base, tmp_path, options, message):
    factors = write_factors(tmp_path / "factors", 0)
    code, _, err = raydit("import", str(factors), str(tmp_path / "out"), "--base", str(base.path), *options)
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_a_superseded_base_is_found(adapted, base, tmp_path):
    opened = adapted()
    expected, output = opened.weights(), base.path.parents[1]
    (output / "superseded").mkdir()
    base.path.parent.rename(output / "superseded" / "checkpoints-1")
    assert equal(open_checkpoint(opened.path).weights(), expected)


def test_a_damaged_adapter_is_refused(adapted):
    opened = adapted()
    file = opened.path / "adapter_ema" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(InvalidInput, match="adapter_model.safetensors: the file changed after it was written"):
        opened.weights()
    with pytest.raises(NotFound, match="has no weights 'ema_0.05': found ema, model"):
        opened.weights("ema_0.05")


def test_a_base_and_its_adapter_are_promoted_together(adapted, base, tmp_path):
    opened = adapted()
    gather(opened, tmp_path / "files")
    expected = samples(opened)
    base.path.rename(tmp_path / "gone")
    files = tmp_path / "files"
    config = checkpoint_recipe(opened)
    protocol = sampling_protocol(config.evaluate, config.seed, opened, config.random)
    copied = CheckpointSampler(files / "checkpoint", protocol, batch_size=2, autoencoder=files / "autoencoder")
    assert (copied.sample([0, 1], np.array([1, 2])) == expected).all()


def test_a_mixture_has_the_changes_of_all_by_their_shares(raydit, adapted, base, tmp_path):
    one, other = adapted(0), adapted(1, layers=LAYERS[:1], rank=3)
    code, out, err = raydit("merge", f"{one.path}=0.25", f"{other.path}=0.5", str(tmp_path / "mixed"), "--json")
    assert (code, err) == (0, "") and "mixed: dit, depth 1" in out
    mixed = load_checkpoint(json.loads(out.splitlines()[-1])["path"])
    plain = base.weights()
    for name, value in mixed.weights().items():
        expected = (
            plain[name] + 0.25 * (one.weights()[name] - plain[name]) + 0.5 * (other.weights()[name] - plain[name])
        )
        torch.testing.assert_close(value, expected)
    parts = mixed.config["source"]["parts"]
    assert [(part["digest"], part["share"]) for part in parts] == [(one.digest, 0.25), (other.digest, 0.5)]
    assert mixed.config["class_names"] == ["blob", "ring", "stripe"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "out"], "found no adapter, expected a checkpoint that was trained with"),
        (["ONE", "ONE", "out"], "expected CHECKPOINT=SHARE with a number"),
        (["ONE=x", "ONE=1", "out"], "expected CHECKPOINT=SHARE with a number"),
        (["ONE=1", "OTHER=1", "out"], "found an adapter of another base"),
        (["ONE", "ONE"], "exists already"),
        (["none", "out"], "no checkpoint at none"),
    ],
)
def test_what_cannot_be_merged_is_refused(raydit, adapted, tmp_path, base, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    one = adapted(0)
    second = write_checkpoint(tiny_output(tmp_path), 3)
    other = import_adapter(write_factors(tmp_path / "f", 1), tmp_path / "other", second.path)
    places = {"BASE": base.path, "ONE": one.path, "OTHER": other.path}
    named = [
        f"{places.get(name, name)}{equals}{share}" for name, equals, share in (a.partition("=") for a in arguments)
    ]
    code, _, err = raydit("merge", *named)
    assert code == 2 and message in err and "Traceback" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("objective", {"kind": "diffusion", "prediction": "v"}, "objective .{'kind': 'diffusion', .*'prediction': 'v'"),
        ("autoencoder", {"sha256": "0" * 64, "tensors_sha256": None}, "autoencoder .*, weights 000000000000"),
        ("autoencoder", {"latents_std": [2.0] * 4}, r"scale of latents .*\[2.0, 2.0, 2.0, 2.0\]"),
        ("objective", {"kind": "flow", "time": "logit_normal"}, None),
    ],
)
def test_adapters_of_other_objectives_and_latents_are_not_added_up(adapted, tmp_path, section, changes, message):
    """How times are drawn in training does not matter."""
    one, other = adapted(0), adapted(1)
    write_completion(other.path, other.config | {section: other.config[section] | changes})
    parts = [(one.path, 0.5), (other.path, 0.5)]
    if message is None:
        assert merge_checkpoints(parts, tmp_path / "merged").step == 0
        return
    with pytest.raises(InvalidInput, match=f"found an adapter of another {message}.*as of {one.path}"):
        merge_checkpoints(parts, tmp_path / "merged")


def test_a_checkpoint_whose_name_ends_as_a_share_does_is_not_cut_in_two(raydit, adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = adapted(0)
    opened.path.rename(tmp_path / "lr=0.001")
    shutil.copytree(tmp_path / "lr=0.001", tmp_path / "lr")
    code, _, err = raydit("merge", "lr=0.001", "lr=0.5", "out")
    assert code == 2 and "lr=0.001: expected CHECKPOINT=SHARE with a number, such as lr=0.001=0.5" in err
    for names, shares in ((["lr=0.001"], [1.0]), (["lr=0.001=0.25", "lr=0.5"], [0.25, 0.5])):
        code, _, err = raydit("merge", *names, f"out-{len(names)}")
        parts = load_checkpoint(tmp_path / f"out-{len(names)}").config["source"]["parts"]
        assert (code, err) == (0, "") and [part["share"] for part in parts] == shares
        assert parts[0]["checkpoint"] == str(tmp_path / "lr=0.001")


def test_exporting_and_importing_an_adapter_changes_nothing(raydit, adapted, base, tmp_path):
    opened = adapted()
    for layout in ("peft", "diffusers-lora"):
        code, out, err = raydit("export", str(opened.path), str(tmp_path / layout), "--format", layout)
        assert (code, err) == (0, "") and "PeftModel.from_pretrained" in out
        code, out, err = raydit(
            "import", str(tmp_path / layout), str(tmp_path / f"{layout} back"), "--base", str(base.path)
        )
        assert (code, err) == (0, "") and "refers to the weights" in out
        assert equal(load_checkpoint(tmp_path / f"{layout} back").weights(), opened.weights())
    names = set(load_file(tmp_path / "diffusers-lora" / "adapter_model.safetensors"))
    assert "base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    official = export_checkpoint(opened, tmp_path / "merged.safetensors", format="official")
    assert equal(load_file(official), opened.weights())


def test_separate_adapters_of_queries_and_values_become_one_of_the_fused_layer(base):
    torch.manual_seed(0)
    width = MODEL.hidden_size
    tensors = {}
    for name, rank in (("to_q", 2), ("to_v", 3)):
        tensors[f"transformer.transformer_blocks.0.attn1.{name}.lora_A.weight"] = torch.randn(rank, width)
        tensors[f"transformer.transformer_blocks.0.attn1.{name}.lora_B.weight"] = torch.randn(width, rank)
        tensors[f"transformer.transformer_blocks.0.attn1.{name}.alpha"] = torch.tensor(float(rank + 1))
    folder = Path(base.path.parents[2]) / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    theirs = read_adapter(folder)
    ours = adapter_from_diffusers(theirs, 1, width).factors["blocks.0.attn.qkv"].change()
    by_name = {name.rpartition(".")[2]: pair.change() for name, pair in theirs.factors.items()}
    assert by_name["to_q"].abs().max() > 0 and theirs.factors["transformer_blocks.0.attn1.to_q"].scale == 1.5
    torch.testing.assert_close(
        ours, torch.cat([by_name["to_q"], torch.zeros(width, width), by_name["to_v"]]), atol=1e-5, rtol=1e-5
    )
    assert adapter_for_diffusers(adapter_from_diffusers(theirs, 1, width), 1).factors.keys() == {
        f"transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: write_factors(folder, 0, layers=("blocks.1.mlp.fc1",), model=deeper()), "no such tensor"),
        (
            lambda folder: write_factors(folder, 0, layers=LAYERS[:1], model=wider()),
            r"changes blocks.0.attn.qkv.weight",
        ),
        (lambda folder: folder.mkdir(), "found no adapter"),
    ],
)
def test_an_adapter_of_another_model_is_not_imported(base, tmp_path, change, message):
    change(tmp_path / "theirs")
    with pytest.raises((InvalidInput, NotFound), match=message):
        import_adapter(tmp_path / "theirs", tmp_path / "out", base.path)
    assert not (tmp_path / "out").exists()


def deeper():
    from dataclasses import replace

    return replace(MODEL, depth=2)


def wider():
    from dataclasses import replace

    return replace(MODEL, hidden_size=64)


def test_an_adapter_is_no_base_and_a_base_no_adapter(adapted, base, tmp_path):
    opened = adapted()
    with pytest.raises(InvalidInput, match="found an adapter as the base of another.*raydit merge CHECKPOINT OUT"):
        import_adapter(tmp_path / "factors-0", tmp_path / "out", opened.path)
    with pytest.raises(InvalidInput, match="found no adapter, which --format peft is for"):
        export_adapter(open_checkpoint(base.path), tmp_path / "out", layout="peft")


def test_an_interrupted_checkpoint_becomes_a_base_under_another_name(base, tmp_path):
    (base.path / "COMPLETE").unlink()
    write_completion(base.path, base.config | {"interrupted": True})
    factors = write_factors(tmp_path / "factors", 0)
    with pytest.raises(InvalidInput, match=r"which is removed when that training resumes.*copy the folder"):
        import_adapter(factors, tmp_path / "out", base.path)
    shutil.copytree(base.path, tmp_path / "base")
    assert import_adapter(factors, tmp_path / "out", tmp_path / "base").weights()


def test_parameters_in_full_replace_those_of_the_base(adapted, base):
    table = {TABLE: torch.ones(4, 32)}
    opened = adapted(layers=LAYERS[:2], **table)
    assert torch.equal(opened.weights()[TABLE], torch.ones(4, 32))
    config = json.loads((opened.path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["y_embedder.embedding_table"]
    network = load_weights(build_model(opened.record.model_config), opened.weights())
    assert torch.equal(network.y_embedder.embedding_table.weight, torch.ones(4, 32))


def test_an_adapter_of_other_classes_keeps_their_names(raydit, base, tmp_path):
    theirs = write_factors(tmp_path / "theirs", 0, **{TABLE: torch.ones(3, 32)})
    (theirs / "class_names.json").write_text('{"class_names": ["cat", "dog"]}')
    imported = import_adapter(theirs, tmp_path / "imported", base.path)
    export_adapter(open_checkpoint(imported.path), tmp_path / "peft", layout="peft")
    again = import_adapter(tmp_path / "peft", tmp_path / "again", base.path)
    merged = merge_checkpoints([(open_checkpoint(again.path), 1.0)], tmp_path / "merged")
    for each in (imported, again, merged):
        assert each.record.class_names == ("cat", "dog") and each.record.model_config.num_classes == 2
        network = load_weights(build_model(each.record.model_config), each.weights())
        assert torch.equal(network.y_embedder.embedding_table.weight, torch.ones(3, 32))
    (theirs / "class_names.json").write_text('{"class_names": [1]}')
    with pytest.raises(InvalidInput, match="found class_names .1., expected a list of texts"):
        import_adapter(theirs, tmp_path / "out", base.path)
    (theirs / "class_names.json").unlink()
    with pytest.raises(InvalidInput, match=r"embedding_table.weight \(3, 32\) beside its factors, .* has \(4, 32\)"):
        import_adapter(theirs, tmp_path / "out", base.path)
    write_factors(tmp_path / "own", 0, **{TABLE: torch.ones(4, 32)})
    code, out, _ = raydit("import", str(tmp_path / "own"), str(tmp_path / "out"), "--base", str(base.path))
    assert code == 0 and "has its own label table but no class names" in out


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.lora_magnitude_vector.weight", f"{TABLE[:-7]}.lora_embedding_A"])
def test_tensors_that_the_model_does_not_have_are_not_imported(base, tmp_path, name):
    write_factors(tmp_path / "theirs", 0, **{name: torch.ones(2, 4)})
    with pytest.raises(InvalidInput, match=r"beside its factors, and the model of the base has no such tensor"):
        import_adapter(tmp_path / "theirs", tmp_path / "out", base.path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_base_of_an_adapter_is_protected_and_found_in_the_registry(base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = checkpoint_recipe(open_checkpoint(base.path))
    uri = config.tracking.uri
    client = MlflowClient(uri)
    said = []
    protected = ProtectedCheckpoints(uri, said.append)
    assert base_digests(uri) == set() and protected.filter_removable({2: base.digest}) == {2: base.digest}
    experiment = client.create_experiment(config.name)
    run = client.create_run(experiment, tags={"raydit.base_digest": base.digest})
    assert protected.filter_removable({2: base.digest, 3: "other"}) == {3: "other"}
    assert said == ["keeping the checkpoint of step 2: it is the base of an adapter"]
    superseded = base.path.parents[1] / "superseded" / "checkpoints-1"
    shutil.copytree(base.path, superseded / base.path.name)
    assert [each.kept_for for each in inspect_superseded(str(base.path.parents[1]), uri)] == [
        "adapters change its step 2"
    ]
    client.delete_run(run.info.run_id)
    assert [each.kept_for for each in inspect_superseded(str(base.path.parents[1]), uri)] == [""]
    shutil.rmtree(superseded)
    assert protected.filter_removable({2: base.digest}) == {2: base.digest}

    tags = {"raydit.checkpoint": str(base.path), "raydit.checkpoint_digest": base.digest}
    client.create_logged_model(experiment, name="base", tags=tags, source_run_id=run.info.run_id)
    assert promote(uri, config.name, "base", PromotionScore(base.digest, "p", "fid_50k", 1.0, 0.1)).given
    opened = open_checkpoint(import_adapter(write_factors(tmp_path / "f", 0), tmp_path / "adapted", base.path).path)
    expected = opened.weights()
    base.path.rename(tmp_path / "gone")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert equal(opened.weights(), expected)
