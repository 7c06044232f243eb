"""Weights of other projects: imported, exported, sampled from and evaluated without a recipe, by command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.autoencoder import (
    LatentScale,
    create_autoencoder,
    describe_autoencoder,
    save_autoencoder,
)
from dit.checkpoint import load_checkpoint
from dit.config import DiTConfig
from dit.formats.completion import write_completion
from dit.formats.diffusers_files import find_weights
from dit.model import DiT
from evaluation.protocol import sample_label
from evaluation.reference import ReferenceStatistics
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import open_checkpoint
from pipelines.sample import sample_file
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol, sampling_protocol
from pipelines.scoring.real_images.references import RealImages, load_real_features, save_reference
from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler
from pipelines.scoring.settings import ScoringSettings

HEADS = ("--set", "model.num_heads=4")


@pytest.fixture(scope="module")
def given_folder(tmp_path_factory):
    """Return a folder with an autoencoder, vae/, and official weights, official.pt."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    save_autoencoder(module, folder / "vae", LatentScale((0.0,) * 4, (2.0,) * 4))
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=3))
    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
    torch.save(weights | {"pos_embed": model.pos_embed.data}, folder / "official.pt")
    return folder


@pytest.fixture
def imported(raydit, given_folder, tmp_path, monkeypatch):
    """Return an imported checkpoint, which is `ours` in the working directory."""
    monkeypatch.chdir(tmp_path)
    code, out, err = raydit(
        "import", str(given_folder / "official.pt"), "ours", "--autoencoder", str(given_folder / "vae"), *HEADS
    )
    assert (code, err) == (0, "")
    assert "ours: dit, depth 1, width 32, patch 2, 3 classes" in out
    return open_checkpoint(tmp_path / "ours")


@pytest.mark.parametrize(
    ("format", "message"), [("official", "a state dict for the official code"), ("diffusers", "trust_remote_code=True")]
)
def test_exporting_and_importing_gives_the_same_weights(raydit, imported, tmp_path, given_folder, format, message):
    code, out, _ = raydit("export", "ours", "theirs", "--format", format)
    assert code == 0 and message in out
    given = ("--autoencoder", str(given_folder / "vae"), *HEADS) if format == "official" else ()
    code, out, _ = raydit("import", "theirs", "again", *given, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["model"] == imported.config["model"]
    again = load_checkpoint(tmp_path / "again")
    assert all(torch.equal(value, imported.weights()[name]) for name, value in again.weights().items())
    assert ("what the official code does, which is not what diffusers does" in out) == (format == "diffusers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "GIVEN/official.pt", "other"], "num_heads cannot be read from weights that look like a DiT of no"),
        (["import", "GIVEN/official.pt", "other", "--model", "DiT-XL/3"], "did you mean 'DiT-XL/"),
        (["import", "GIVEN/official.pt", "ours", *HEADS], "ours exists already, expected a new path"),
        (
            ["import", "GIVEN/official.pt", "other", "--set", "train.steps=4"],
            "--set train.steps=4: expected a field of",
        ),
        (
            ["import", "GIVEN/official.pt", "other", *HEADS, "--set", "model.heads=4"],
            "heads is not a field of a dit model",
        ),
        (["import", "GIVEN/vae", "other"], "vae is not a diffusers pipeline: found no model_index.json"),
        (["import", "GIVEN/vae", "other", "--model", "DiT-XL/2"], "--model: found with a pipeline folder"),
        (["export", "ours", "GIVEN/vae", "--format", "diffusers"], "vae exists already"),
        (["export", "ours", "other", "--format", "official", "--weights", "best"], "best"),
        (["sample", "GIVEN/official.pt"], "is a file, expected a checkpoint folder"),
        (["evaluate", "ours"], "images.path: found nothing (the checkpoint is imported), expected images"),
    ],
)
def test_bad_input_gives_one_error_and_changes_nothing(raydit, imported, given_folder, tmp_path, arguments, message):
    code, _, err = raydit(*[argument.replace("GIVEN", str(given_folder)) for argument in arguments])
    assert code == 2 and message in err and "Traceback" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_the_autoencoder_is_verified_if_its_digest_is_recorded(imported):
    recorded = imported.config["autoencoder"]
    checkpoint_autoencoder(imported)
    recorded["sha256"] = None
    checkpoint_autoencoder(imported)
    recorded["sha256"] = recorded["tensors_sha256"] = "0" * 64
    with pytest.raises(ValueError, match="its samples would decode to noise"):
        checkpoint_autoencoder(imported)


def test_an_autoencoder_that_was_saved_again_is_recognised_by_its_tensors(imported, given_folder, tmp_path):
    """The protocol keeps the recorded digest of the file; other weights and records without tensors do not fit."""
    recorded = imported.config["autoencoder"]
    vae = tmp_path / "vae"
    shutil.copytree(given_folder / "vae", vae)
    recorded["id"] = str(vae)
    file = vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(dict(reversed(tensors.items())), file, metadata={"format": "pt", "saved": "again"})
    assert describe_autoencoder(vae)["sha256"] != recorded["sha256"]
    assert find_weights(vae).tensors_sha256 == recorded["tensors_sha256"]
    assert checkpoint_autoencoder(imported) == vae
    evaluate = checkpoint_recipe(imported).evaluate
    assert sampling_protocol(evaluate, 0, imported).decoder == recorded["sha256"]
    torch.save(tensors, vae / "diffusion_pytorch_model.bin")
    file.rename(tmp_path / "kept")
    assert find_weights(vae).tensors_sha256 == recorded["tensors_sha256"] and checkpoint_autoencoder(imported) == vae
    (tmp_path / "kept").rename(file)
    with pytest.raises(ValueError, match="its samples would decode to noise"):
        known = recorded.pop("tensors_sha256")
        checkpoint_autoencoder(imported)
    recorded["tensors_sha256"] = known
    name = min(tensors)
    for changed in ({name: tensors[name] + 1}, {name: tensors[name].reshape(1, -1)}, {name: tensors[name].half()}):
        save_file(tensors | changed, file)
        with pytest.raises(ValueError, match="its samples would decode to noise"):
            checkpoint_autoencoder(imported)


def test_a_grid_is_drawn_without_recipe_or_images(raydit, imported, tmp_path):
    classes = ("--classes", "0,2", "--classes", "1")
    code, out, _ = raydit("sample", "ours", *classes, "--columns", "2", "--set", "evaluate.sampling_steps=2")
    assert code == 0 and (tmp_path / "grid.png").is_file() and "grid.png" in out


def test_an_import_is_evaluated_against_given_statistics(imported, tmp_path):
    statistics = ReferenceStatistics(
        n=5, mu=np.zeros(4), sigma=np.eye(4), extractor="inception", extractor_sha256="0", size=16, crop="adm"
    )
    save_reference(statistics, str(tmp_path / "reference.npz"))
    config = checkpoint_recipe(
        imported, (f"evaluate.reference={tmp_path / 'reference.npz'}", "evaluate.extractor=efficientnet-lite0")
    )
    assert config.folder("evaluations") == str(tmp_path / "evaluations")
    assert (config.images.size, config.evaluate.sampler, config.evaluate.sampling_steps) == (16, "ddpm", 250)
    settings = ScoringSettings.from_recipe(config)
    protocol = evaluation_protocol(settings, imported)
    assert protocol.decoder == imported.config["autoencoder"]["sha256"]
    reference, held_out = load_real_features(RealImages.of(settings))
    assert reference.n == 5 and held_out is None


def test_a_given_recipe_says_how_to_evaluate_and_the_checkpoint_what(raydit, imported, given_folder, tmp_path):
    """The recipe is one for flow with an autoencoder of its own; the checkpoint is of diffusion."""
    from PIL import Image

    tiny = str(Path(__file__).resolve().parents[2] / "recipes" / "tiny.toml")
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.new("RGB", (16, 16), (20 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    for command in (["evaluate", "ours", "--dry-run"], ["sample", "ours"]):
        code, _, err = raydit(*command, "--recipe", tiny)
        assert code == 2 and err.count("\n") == 2, err
        assert "tiny.toml:" in err and "evaluate.sampler: found 'euler', a sampler for flow" in err
        assert "expected one of ddpm, ddim, dpmpp_2m" in err
    fitting = ("--recipe", tiny, "--set", "evaluate.sampler=ddim")
    code, out, err = raydit("evaluate", "ours", "--dry-run", "--json", *fitting)
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("recipe "))
    assert "ours is used as it was trained, not as" in line and 'autoencoder.id: null -> "' in line
    plan = json.loads(out[out.index("\n{\n") : out.index("\n}") + 2])
    assert plan["objective"]["kind"] == "diffusion" and plan["model"]["depth"] == 1
    assert plan["autoencoder"]["id"] == str(given_folder / "vae")
    assert (plan["evaluate"]["sampler"], plan["evaluate"]["num_samples"], plan["output"]) == (
        "ddim",
        16,
        "outputs/tiny",
    )
    code, out, err = raydit("sample", "ours", *fitting, "--columns", "1", "--out", "given.png")
    assert code == 0 and (tmp_path / "given.png").is_file(), err


def test_an_import_is_scored_as_a_given_reference_was_made(raydit, imported, tmp_path):
    from evaluation.extractors import extractor_sha256

    extractor = "efficientnet-lite0"
    digest = extractor_sha256(extractor)
    for size in (16, 32):
        statistics = ReferenceStatistics(
            n=5, mu=np.zeros(4), sigma=np.eye(4), extractor=extractor, extractor_sha256=digest, size=size, crop="resize"
        )
        save_reference(statistics, str(tmp_path / f"{size}.npz"))
    code, out, err = raydit("evaluate", "ours", "--reference", "16.npz", "--dry-run")
    assert code == 0, err
    plan = json.loads(out[: out.index("\n}") + 2])
    assert (plan["evaluate"]["extractor"], plan["images"]["crop"], plan["images"]["size"]) == (extractor, "resize", 16)
    code, _, err = raydit("evaluate", "ours", "--reference", "32.npz", "--dry-run")
    assert code == 2 and "32" in err and "16" in err and len(err.strip().splitlines()) == 1
    for reference in ("none.npz", "ours"):
        code, _, err = raydit("evaluate", "ours", "--reference", reference, "--dry-run")
        assert code == 2 and reference in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
def test_a_sample_file_holds_sample_i_at_index_i_whatever_the_shards(raydit, imported, local_ray, tmp_path):
    settings = ["evaluate.sampling_steps=2", "evaluate.shard_rows=2", "evaluate.batch_size=2", "seed=3"]
    flags = [part for setting in settings for part in ("--set", setting)]
    code, out, _ = raydit("sample", "ours", "--npz", "samples.npz", "--num-samples", "5", *flags)
    assert code == 0 and "samples.npz" in out
    with np.load("samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
        assert file.files == ["arr_0", "arr_1"]
    assert (images.shape, images.dtype) == ((5, 16, 16, 3), np.uint8)
    assert labels.dtype == np.int64 and labels.tolist() == [sample_label(3, index, 3, "random") for index in range(5)]
    config = checkpoint_recipe(imported, tuple(settings))
    sampler = CheckpointSampler(
        imported.path, sampling_protocol(config.evaluate, config.seed, imported, config.random), batch_size=2
    )
    alone = sampler.sample([3, 1], labels[[3, 1]])
    assert np.abs(alone.astype(int) - images[[3, 1]]).max() <= 1
    assert images.std() > 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours", "samples.npz"]  # no shards are left
    with pytest.raises(FileExistsError, match="samples.npz exists already"):
        sample_file(imported.path, config, str(tmp_path / "samples.npz"), num_samples=5)


def test_weights_with_nan_are_refused_wherever_they_are_read(raydit, imported, given_folder, tmp_path):
    """An official file, a pipeline, its autoencoder, and a checkpoint that an earlier version has imported."""
    name = "blocks.0.attn.qkv.weight"
    given = str(given_folder / "official.pt")
    official = torch.load(given, weights_only=True)
    official[name][0, 0] = torch.nan
    torch.save(official, tmp_path / "nan.pt")
    vae = ("--autoencoder", str(given_folder / "vae"))
    assert raydit("export", "ours", "pipeline", "--format", "diffusers")[0] == 0
    shutil.copytree(given_folder / "vae", tmp_path / "vae")
    damaged = {
        tmp_path / "pipeline" / "transformer": "transformer_blocks.0.attn1.to_q.weight",
        tmp_path / "vae": "decoder.conv_in.weight",
        tmp_path / "ours": name,
    }
    for folder, tensor in damaged.items():
        file = folder / ("ema.safetensors" if folder.name == "ours" else "diffusion_pytorch_model.safetensors")
        weights = load_file(file)
        weights[tensor].view(-1)[-1] = -torch.inf
        save_file(weights, file)
    write_completion(tmp_path / "ours", json.loads((tmp_path / "ours" / "config.json").read_text()))
    commands = {
        ("import", "nan.pt", "other", *vae, *HEADS): name,
        ("import", "pipeline", "other", *vae): "transformer_blocks.0.attn1.to_q.weight",
        (
            "import",
            str(given_folder / "official.pt"),
            "other",
            "--autoencoder",
            "vae",
            *HEADS,
        ): "decoder.conv_in.weight",
        ("sample", "ours", "--out", "grid.png"): name,
        ("export", "ours", "exported", "--format", "official"): name,
    }
    for command, tensor in commands.items():
        code, _, err = raydit(*command)
        assert code == 2 and f"the tensor {tensor} is NaN or infinite in 1 of its" in err, (command, err)
        assert not (tmp_path / "other").exists() and not (tmp_path / "grid.png").exists()
