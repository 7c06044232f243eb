"""The digests that name an autoencoder stand for what is loaded and computed, whatever else lies in its folder."""

import inspect
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.autoencoder import (
    Autoencoder,
    LatentScale,
    create_autoencoder,
    describe_autoencoder,
    is_same_autoencoder,
    save_autoencoder,
)
from dit.formats.autoencoder_digests import COMPUTING_FIELDS, config_sha256, further_digests
from raydit.errors import InvalidInput

WEIGHTS = "diffusion_pytorch_model"
SCALE = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps", "batch_norm_momentum"}
NOT_COMPUTING = {*SCALE, "force_upcast", "sample_size", "noise_tau", "use_encoder_loss", "image_size"}
NOT_COMPUTING |= {"encoder_norm_mean", "encoder_norm_std"}  # that of the weights counts


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "vae"
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    save_autoencoder(module, folder, LatentScale((0.0,) * 4, (1.0,) * 4))
    return folder


@pytest.fixture
def vae(good, tmp_path):
    return shutil.copytree(good, tmp_path / "vae")


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def recorded_of(folder):
    return {**describe_autoencoder(folder), **further_digests(folder)}


@pytest.mark.parametrize("name", ["{}.safetensors.index.json", "{}.bin.index.json"])
def test_shards_that_diffusers_would_load_in_place_of_the_hashed_file_are_refused(vae, name):
    """By such an index, planted beside the file, diffusers loaded zeros under the file's digest."""
    zeros = {key: torch.zeros_like(value) for key, value in load_file(vae / f"{WEIGHTS}.safetensors").items()}
    save_file(zeros, vae / f"{WEIGHTS}-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(zeros, f"{WEIGHTS}-00001-of-00001.safetensors")}
    (vae / name.format(WEIGHTS)).write_text(json.dumps(index))
    for use in (describe_autoencoder, Autoencoder.load):
        with pytest.raises(InvalidInput, match=r"index.json, expected only one of the two.*Remove the one"):
            use(vae)


@pytest.mark.parametrize("name", ["{}.safetensors.index.fp16.json", "{}.safetensors.fp16.index.json"])
def test_the_same_holds_for_a_variant(vae, name):
    (vae / f"{WEIGHTS}.safetensors").rename(vae / f"{WEIGHTS}.fp16.safetensors")
    assert describe_autoencoder(vae)["class"] == "AutoencoderKL"
    (vae / name.format(WEIGHTS)).write_text('{"weight_map": {}}')
    with pytest.raises(InvalidInput, match="expected only one of the two"):
        Autoencoder.load(vae)


@pytest.mark.parametrize("listed", ["../private.safetensors", "/etc/passwd", "a/../../b", "", None, 5])
def test_an_index_lists_shards_of_its_own_folder_only(vae, listed):
    (vae / f"{WEIGHTS}.safetensors").rename(vae.parent / "private.safetensors")
    index = vae / f"{WEIGHTS}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": listed}}))
    with pytest.raises(InvalidInput, match=f"{index}: found .* expected names of files in its own folder"):
        describe_autoencoder(vae)


def test_a_config_that_computes_something_else_is_another_autoencoder(vae):
    recorded, images = recorded_of(vae), torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    before = Autoencoder.load(vae).encode(images)
    for field, value in {"norm_num_groups": 4, "act_fn": "relu"}.items():
        kept = (vae / "config.json").read_text()
        change_config(vae, **{field: value})
        assert not torch.allclose(Autoencoder.load(vae).encode(images), before, atol=1e-3)
        assert describe_autoencoder(vae)["sha256"] == recorded["sha256"] and not is_same_autoencoder(vae, recorded)
        (vae / "config.json").write_text(kept)
    assert is_same_autoencoder(vae, recorded)


def test_what_other_tools_write_into_a_config_changes_nothing(vae):
    """They fill in defaults, and name themselves. A record without the config's digest is one of before it existed."""
    recorded = recorded_of(vae)
    change_config(vae, layers_per_block=1, use_quant_conv=True, _name_or_path="/tmp/x", _diffusers_version="9.9")
    change_config(vae, sample_size=512, force_upcast=False)
    assert is_same_autoencoder(vae, recorded)
    change_config(vae, norm_num_groups=4)
    assert is_same_autoencoder(vae, {**recorded, "config_sha256": None})


def test_a_quantized_config_is_refused(vae):
    change_config(vae, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    for use in (describe_autoencoder, Autoencoder.load):
        with pytest.raises(InvalidInput, match="found quantization_config"):
            use(vae)


@pytest.mark.parametrize("name", COMPUTING_FIELDS)
def test_the_computing_fields_and_their_defaults_are_those_of_diffusers(name):
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {field: each.default for field, each in parameters.items() if field != "self"}
    found = json.loads(json.dumps(defaults))
    assert {field: value for field, value in found.items() if field not in NOT_COMPUTING} == COMPUTING_FIELDS[name]


def test_the_digest_of_a_config_is_of_its_values(vae):
    """Written down, so that records stay valid."""
    assert config_sha256(vae)[:12] == "1458f3bbfabe"
