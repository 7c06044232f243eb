"""Autoencoders and pipelines as people have them: variants, shards, whole pipelines and Git LFS pointers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.autoencoder import (
    Autoencoder,
    check_autoencoder,
    create_autoencoder,
    describe_autoencoder,
    locate_autoencoder,
)
from dit.files import digest_of_files, sha256_of
from dit.formats.diffusers_files import find_weights
from dit.formats.weights import read_weights
from raydit.errors import InvalidInput

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)


@pytest.fixture(scope="module")
def plain(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "shards"),
    [
        ({"variant": "fp16"}, 0),
        ({"variant": "fp16", "safe_serialization": False}, 0),
        ({"max_shard_size": "100KB"}, 2),
        ({"max_shard_size": "100KB", "variant": "fp16"}, 2),
    ],
)
def test_variants_and_shards_are_loaded_as_the_same_autoencoder(module, plain, tmp_path, options, shards):
    module.save_pretrained(tmp_path, **options)
    assert not (tmp_path / f"{NAME}.safetensors").exists()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = Autoencoder.load(plain).encode(images)
    assert torch.equal(Autoencoder.load(tmp_path).encode(images), expected)
    found = find_weights(tmp_path).read()
    assert found.keys() == load_file(plain / f"{NAME}.safetensors").keys()
    files = sorted(file for file in tmp_path.iterdir() if "json" not in file.name)
    assert len(files) == max(1, shards)
    digests = {file.name: sha256_of(file) for file in files}
    expected_digest = digest_of_files(digests) if shards else digests[files[0].name]
    assert describe_autoencoder(tmp_path)["sha256"] == expected_digest


def test_a_file_without_variant_keeps_its_identity_beside_others(module, plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    module.save_pretrained(tmp_path, variant="fp16")
    digest = sha256_of(plain / f"{NAME}.safetensors")
    assert describe_autoencoder(tmp_path)["sha256"] == describe_autoencoder(plain)["sha256"] == digest


def test_the_autoencoder_of_a_pipeline_is_found_in_its_folder(plain, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    shutil.copytree(plain, tmp_path / "vae")
    assert locate_autoencoder(str(tmp_path)) == tmp_path / "vae"
    assert locate_autoencoder(str(tmp_path / "vae")) == tmp_path / "vae"
    assert describe_autoencoder(locate_autoencoder(str(tmp_path))) == describe_autoencoder(plain)


def test_a_missing_shard_is_named(module, tmp_path):
    module.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / f"{NAME}-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"found 1 of 2 shards; {NAME}-00001-of-00002.safetensors is missing"):
        describe_autoencoder(tmp_path)


def test_a_weight_that_is_nan_is_found_in_any_shard(module, tmp_path):
    module.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = tmp_path / f"{NAME}-00002-of-00002.safetensors"
    weights = load_file(shard)
    broken = min(weights)
    weights[broken].view(-1)[0] = float("nan")
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{shard.name}: the tensor {broken} is NaN or infinite in 1 of its"):
        check_autoencoder(tmp_path)
    with pytest.raises(ValueError, match=f"the tensor {broken} is NaN or infinite"):
        Autoencoder.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", f"{NAME}.safetensors", f"{NAME}.fp16.safetensors"])
def test_a_git_lfs_pointer_among_the_files_is_named(plain, tmp_path, name):
    weights = f"{NAME}.safetensors" if name == "config.json" else name
    shutil.copy(plain / "config.json", tmp_path)
    shutil.copy(plain / f"{NAME}.safetensors", tmp_path / weights)
    (tmp_path / name).write_text(POINTER)
    for use in (describe_autoencoder, Autoencoder.load):
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, expected .*git lfs pull"):
            use(tmp_path)


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.pt"])
def test_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, expected the weights. Run `git lfs pull`"):
        read_weights(tmp_path / name)


def test_an_index_that_is_none_is_refused(plain, tmp_path):
    shutil.copy(plain / "config.json", tmp_path)
    (tmp_path / f"{NAME}.safetensors.index.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="found no index of shards"):
        describe_autoencoder(tmp_path)


def test_a_pickle_of_other_bytes_than_were_saved_is_refused_where_diffusers_loads_it(module, tmp_path):
    module.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / f"{NAME}.bin"
    data = bytearray(file.read_bytes())
    data[data.index(module.decoder.conv_in.weight.numpy(force=True).tobytes()) + 400] ^= 1
    file.write_bytes(data)
    for use in (Autoencoder.load, check_autoencoder):
        with pytest.raises(
            InvalidInput, match=rf"{NAME}.bin is damaged: found \S+ with bytes that do not match its checksum"
        ):
            use(tmp_path)
