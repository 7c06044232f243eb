"""The autoencoder classes of diffusers beyond AutoencoderKL: raydit encodes, scales and decodes as diffusers does."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_autoencoders import CHANNELS, SIDE, fields, write_autoencoder
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dit.autoencoder import (
    Autoencoder,
    check_autoencoder,
    describe_autoencoder,
    images_to_uint8,
    record_autoencoder,
    sample_posterior,
)
from dit.autoencoders.kinds import KINDS, describe_shape, latent_side, moments_channels
from dit.autoencoders.latent_scale import LatentScale, latent_scale, scale_of
from dit.autoencoders.size import decoder_size, encoder_size, read_config
from dit.checkpoint import import_official
from dit.config import DiTConfig
from dit.formats.diffusers_pipeline import pipeline_scale
from dit.formats.diffusers_pipeline import write_autoencoder as export_autoencoder
from dit.formats.record import AutoencoderRecord
from dit.model import DiT
from raydit.errors import InvalidInput


@pytest.fixture(scope="module", params=CHANNELS)
def tiny(request, tmp_path_factory):
    """Name, module and folder of a tiny autoencoder of each class."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_autoencoder(request.param, folder), folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) * 2 - 1


def scaled_by_diffusers(name, module, images):
    """Scaled latents of images in [-1, 1], as diffusers' own pipelines or classes compute them."""
    if name == "AutoencoderRAE":
        return module.encode((images + 1) / 2).latent  # it normalises by itself
    if name == "AutoencoderDC":
        return module.encode(images).latent * module.config.scaling_factor
    latents = module.encode(images).latent_dist.mode()
    if name == "AutoencoderKL":
        mean, std = (torch.tensor(module.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (latents - mean) / std
    mean = module.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(module.bn.running_var.view(1, -1, 1, 1) + module.config.batch_norm_eps)
    return pixel_shuffle((pixel_unshuffle(latents, 2) - mean) / std, 2)


def decoded_by_diffusers(name, module, latents):
    """Images in [-1, 1] of scaled latents."""
    if name == "AutoencoderRAE":
        return module.decode(latents).sample * 2 - 1
    if name == "AutoencoderDC":
        return module.decode(latents / module.config.scaling_factor).sample
    if name == "AutoencoderKL":
        mean, std = (torch.tensor(module.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return module.decode(latents * std + mean).sample
    mean = module.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(module.bn.running_var.view(1, -1, 1, 1) + module.config.batch_norm_eps)
    return module.decode(pixel_shuffle(pixel_unshuffle(latents, 2) * std + mean, 2)).sample


@torch.no_grad()
def test_scaled_latents_are_those_of_diffusers(tiny, images):
    name, module, folder = tiny
    autoencoder, channels = Autoencoder.load(folder), CHANNELS[name]
    moments = autoencoder.encode(images)
    assert moments.shape == (2, channels if KINDS[name].deterministic else 2 * channels, 4, 4)
    assert moments.dtype == torch.float32 and moments.is_contiguous()
    latents = autoencoder.scale.scale(moments[:, :channels])
    torch.testing.assert_close(latents, scaled_by_diffusers(name, module, images), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(autoencoder.scale.unscale(latents), moments[:, :channels], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_decoded_images_are_those_of_diffusers(tiny, images):
    name, module, folder = tiny
    latents = torch.randn(2, CHANNELS[name], 4, 4, generator=torch.Generator().manual_seed(3))
    expected = images_to_uint8(decoded_by_diffusers(name, module, latents)).int()
    decoded = Autoencoder.load(folder).decode(latents)
    assert decoded.shape == (2, SIDE, SIDE, 3) and decoded.float().std() > 1
    assert (decoded.int() - expected).abs().max() <= 1  # a rounding at the edge of a byte


def test_deterministic_moments_take_no_noise_and_are_not_scaled(tiny, images):
    name, _, folder = tiny
    moments = Autoencoder.load(folder).encode(images)
    noise = torch.full((2, CHANNELS[name], 4, 4), 7.0)
    drawn = sample_posterior(moments.half(), noise)
    assert drawn.dtype == torch.float32 and drawn.shape == noise.shape
    assert torch.equal(drawn, moments.half().float()) == KINDS[name].deterministic


@torch.no_grad()
def test_the_features_of_a_representation_autoencoder_are_stored_as_its_encoder_gives_them(tmp_path, images):
    """Resized and normalised once: by diffusers' class, from pixels in [0, 1]."""
    module = write_autoencoder("AutoencoderRAE", tmp_path)
    resized = torch.nn.functional.interpolate((images + 1) / 2, size=28, mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    tokens = module.encoder((resized - mean) / std).last_hidden_state[:, 5:]
    assert torch.equal(Autoencoder.load(tmp_path).encode(images), tokens.transpose(1, 2).reshape(2, 64, 4, 4))


def test_the_record_holds_shape_and_scale_in_a_form_that_json_and_checkpoints_keep(tiny):
    name, _, folder = tiny
    record = json.loads(json.dumps({"id": "x", **describe_autoencoder(folder)}))
    loaded = Autoencoder.load(folder)
    assert scale_of(record) == loaded.scale == AutoencoderRecord.from_dict(record).scale
    assert (record["class"], record["latent_channels"], record["downsample"]) == (name, CHANNELS[name], 4)
    assert record.get("posterior") == ("deterministic" if KINDS[name].deterministic else None)
    assert record.get("image_size") == (SIDE if name == "AutoencoderRAE" else None)
    shapes = {
        "AutoencoderKL": None,
        "AutoencoderKLFlux2": (16,),
        "AutoencoderDC": (8,),
        "AutoencoderRAE": (64, 4, 4),
    }
    if shapes[name] is None:
        assert "scale" not in record and len(record["latents_mean"]) == 4
    else:
        assert np.shape(record["scale"]["mean"]) == np.shape(record["scale"]["std"]) == shapes[name]
        assert record["scale"].get("patch") == (2 if name == "AutoencoderKLFlux2" else None)


def test_half_precision_keeps_the_scale_of_the_files(tiny, images):
    name, _, folder = tiny
    exact, half = Autoencoder.load(folder), Autoencoder.load(folder, dtype=torch.bfloat16)
    assert half.scale == exact.scale
    moments, rounded = (each.encode(images)[:, : CHANNELS[name]] for each in (exact, half))
    assert (moments - rounded).abs().mean() < 0.05 * moments.std()


def test_a_scale_of_patches_repeats_over_the_latents():
    scale = LatentScale(tuple(range(8)), (1.0,) * 8, patch=2)
    latents = torch.zeros(2, 4, 6)  # (C, h, w)
    unscaled = scale.unscale(latents)
    assert all(unscaled[c, y, x] == 4 * c + 2 * (y % 2) + x % 2 for c in range(2) for y in range(4) for x in range(6))
    assert LatentScale.from_json(scale.to_json()) == scale


def test_statistics_of_a_config_may_be_nested_and_must_be_of_the_channels():
    config = {"latent_channels": 2, "latents_mean": [[[[1]], [[2]]]], "latents_std": [[[[3]], [[4]]]]}
    assert latent_scale(config | {"scaling_factor": 0.5}) == LatentScale((1.0, 2.0), (6.0, 8.0))
    with pytest.raises(InvalidInput, match="latents_mean of 2 and latents_std of 2 values, expected one for each of"):
        latent_scale(config | {"latent_channels": 3})


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("AutoencoderRAE", 32, "found 32, expected 16, the only size"),
        ("AutoencoderKLFlux2", 12, "found 12, expected a multiple of 8, .* latent pixel and its 2x2 patches"),
        ("AutoencoderDC", 18, "found 18, expected a multiple of 4"),
    ],
)
def test_an_image_size_that_does_not_fit_is_refused(name, size, message):
    shape = describe_shape({"_class_name": name, **fields(name, torch.Generator())})
    assert latent_side(SIDE, shape) == 4
    with pytest.raises(InvalidInput, match=message):
        latent_side(size, shape)


def test_an_encoder_of_one_size_refuses_other_images(tmp_path):
    write_autoencoder("AutoencoderRAE", tmp_path)
    with pytest.raises(InvalidInput, match="expected 16, the only size"):
        Autoencoder.load(tmp_path).encode(torch.zeros(1, 3, 28, 28))


def test_an_imported_model_must_have_latents_that_its_autoencoder_decodes(tmp_path):
    write_autoencoder("AutoencoderKLFlux2", tmp_path)
    assert record_autoencoder(str(tmp_path), 4, (4, 4))["scale"]["patch"] == 2
    with pytest.raises(InvalidInput, match="latents of 3x3, .* expected latents that 2x2 patches divide"):
        record_autoencoder(str(tmp_path), 4, (3, 3))


def test_a_config_that_diffusers_would_read_otherwise_is_refused(tmp_path):
    write_autoencoder("AutoencoderKLFlux2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": [2, 1]}))
    with pytest.raises(InvalidInput, match=r"found patch_size = \[2, 1\], expected a square"):
        describe_autoencoder(tmp_path)


def test_the_sizes_that_plans_use_are_those_of_the_modules(tiny):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    name, module, folder = tiny
    config = read_config(folder)
    assert moments_channels(describe_shape(config)) == CHANNELS[name] * (1 if KINDS[name].deterministic else 2)
    halves = {
        ("encoder", "quant"): (encoder_size, lambda: module.encode(torch.zeros(1, 3, SIDE, SIDE))),
        ("decoder", "post_quant"): (decoder_size, lambda: module.decode(torch.zeros(1, CHANNELS[name], 4, 4))),
    }
    for names, (size_of, run) in halves.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        size = size_of(config, SIDE)
        assert 2 * size.macs == counter.get_total_flops()
        assert size.parameters == sum(p.numel() for key, p in module.named_parameters() if key.startswith(names))


def test_an_official_file_is_imported_with_such_an_autoencoder(tiny, tmp_path):
    name, _, folder = tiny
    model = DiT(DiTConfig(input_size=4, patch_size=2, in_channels=CHANNELS[name], hidden_size=32, depth=1, num_heads=2))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    checkpoint = import_official(
        tmp_path / "weights.safetensors", tmp_path / "out", num_heads=2, autoencoder=str(folder)
    )
    assert checkpoint.record.autoencoder.scale == Autoencoder.load(folder).scale
    if name == "AutoencoderRAE":
        other = DiT(DiTConfig(input_size=8, patch_size=2, in_channels=64, hidden_size=32, depth=1, num_heads=2))
        save_file(other.state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(InvalidInput, match="for images of 32 pixels, expected images of 16 pixels"):
            import_official(tmp_path / "other.safetensors", tmp_path / "no", num_heads=2, autoencoder=str(folder))


def test_a_pipeline_is_written_only_with_a_scale_that_it_reads(tiny, tmp_path):
    name, _, folder = tiny
    scale = Autoencoder.load(folder).scale
    if KINDS[name].scaling_factor is None:
        with pytest.raises(InvalidInput, match=f"DiTPipeline cannot express the scale of {name}"):
            export_autoencoder(folder, tmp_path / "vae", scale)
        return
    export_autoencoder(folder, tmp_path / "vae", scale)
    latents = torch.randn(1, CHANNELS[name], 4, 4, generator=torch.Generator().manual_seed(4))
    written = Autoencoder.load(tmp_path / "vae")
    assert pipeline_scale(tmp_path / "vae").std == pytest.approx(written.scale.std)
    difference = written.decode(latents).int() - Autoencoder.load(folder).decode(latents).int()
    assert difference.abs().max() <= 1


def test_a_representation_autoencoder_without_transformers_is_refused_before_its_weights_are_read(
    tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    monkeypatch.setattr("dit.autoencoders.kinds.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"found no package transformers, .*Run `pip install 'raydit\[rae\]'`"):
        check_autoencoder(tmp_path)


def test_statistics_in_a_pickle_are_read_like_those_of_safetensors(tmp_path):
    module = write_autoencoder("AutoencoderKLFlux2", tmp_path / "safe")
    (tmp_path / "pickle").mkdir()
    shutil.copy(tmp_path / "safe" / "config.json", tmp_path / "pickle")
    torch.save(module.state_dict(), tmp_path / "pickle" / "diffusion_pytorch_model.bin")
    safe, pickled = (describe_autoencoder(tmp_path / name)["scale"] for name in ("safe", "pickle"))
    assert safe == pickled and safe["mean"] == pytest.approx(module.bn.running_mean.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift_factor": "high"}, "shift_factor high, expected numbers"),
        ({"latents_mean": ["a", "b"], "latents_std": [1, 1]}, r"latents_mean \['a', 'b'\], expected numbers"),
        ({"latents_mean": [0, 0], "latents_std": [1, 0]}, "finite standard deviations above 0"),
        ({"latents_mean": [0, math.nan], "latents_std": [1, 1]}, "expected finite means"),
    ],
)
def test_a_scale_that_is_not_one_is_refused(fields, message):
    with pytest.raises(InvalidInput, match=message):
        latent_scale({"latent_channels": 2, **fields})


def test_statistics_of_another_shape_are_refused(tmp_path):
    config = {"_class_name": "AutoencoderRAE", **fields("AutoencoderRAE", torch.Generator())}
    one_per_channel = {"_latents_mean": torch.ones(1, 64, 1, 1), "_latents_std": torch.ones(64, 1, 1)}
    assert latent_scale(config, one_per_channel).shape is None
    assert latent_scale({**config, "latents_mean": None, "latents_std": None}).mean == (0.0,) * 64
    with pytest.raises(InvalidInput, match=r"_latents_mean of shape \(64, 5, 5\), expected \(64, 4, 4\)"):
        latent_scale(config, {**one_per_channel, "_latents_mean": torch.ones(64, 5, 5)})
    with pytest.raises(InvalidInput, match=r"bn.running_mean of shape \(4,\), expected \(16,\)"):
        latent_scale({"_class_name": "AutoencoderKLFlux2", "latent_channels": 4}, {"bn.running_mean": torch.ones(4)})


def test_patches_have_the_channels_of_diffusers_pipeline():
    pytest.importorskip("transformers")
    from diffusers import Flux2Pipeline

    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(Flux2Pipeline._patchify_latents(latents), pixel_unshuffle(latents, 2))
