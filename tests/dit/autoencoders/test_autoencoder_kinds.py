"""Tiny autoencoders; and autoencoders in other precisions and memory layouts, which hardly change results."""

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from dit.autoencoder import (
    DETERMINISTIC_LOG_VARIANCE,
    MEMORY_FORMATS,
    Autoencoder,
    LatentScale,
    create_autoencoder,
    describe_autoencoder,
    images_from_uint8,
    images_to_uint8,
    latent_scale,
    psnr,
    sample_posterior,
    save_autoencoder,
)
from dit.autoencoders.objective import AutoencoderObjective

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny autoencoder and the folder that diffusers wrote it to."""
    torch.manual_seed(0)
    channels, blocks = (8, 8, 8), (1, 1, 1)
    module = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    folder = tmp_path_factory.mktemp("tiny")
    module.eval().save_pretrained(folder)
    return module, folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of an autoencoder that has learned two smooth images, and the images: uint8 (2, 16, 16, 3)."""
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 3, 3) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(-1, 1)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    objective = AutoencoderObjective(module, kl_weight=0.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for _ in range(60):
        optimizer.zero_grad()
        objective(images, torch.zeros(2, 4, 8, 8))["loss"].backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    save_autoencoder(module, folder, LatentScale((0.0,) * 4, (1.0,) * 4))
    return folder, images_to_uint8(images)


def test_latents_of_a_tiny_autoencoder_are_the_mean_of_a_deterministic_posterior(tiny):
    module, folder = tiny
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = Autoencoder.load(folder).encode(images)
    with torch.no_grad():
        latents = module.encode(images).latents
    mean, log_variance = moments.chunk(2, dim=1)
    assert moments.shape == (2, 8, 4, 4) and moments.dtype == torch.float32
    assert torch.equal(mean, latents) and bool((log_variance == DETERMINISTIC_LOG_VARIANCE).all())
    torch.testing.assert_close(sample_posterior(moments, torch.randn_like(mean)), latents, atol=2e-6, rtol=0)


def test_moments_of_a_tiny_autoencoder_are_finite_in_the_stored_dtype(tiny):
    moments = Autoencoder.load(tiny[1]).encode(torch.rand(1, 3, 16, 16) * 2 - 1).numpy()
    stored = moments.astype(np.float16)
    assert bool((stored[:, 4:] == DETERMINISTIC_LOG_VARIANCE).all()) and bool(np.isfinite(stored).all())


def test_a_tiny_autoencoder_decodes_by_its_own_scale(tiny):
    module, folder = tiny
    autoencoder, latents = Autoencoder.load(folder), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = images_to_uint8(module.decode(latents).sample)
    assert autoencoder.scale == LatentScale((0.0,) * 4, (1.0,) * 4)
    assert torch.equal(autoencoder.decode(latents), expected)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_description_of_a_tiny_autoencoder_agrees_with_the_loaded_one(tiny, tmp_path, factor):
    module, folder = tiny
    weights = (folder / WEIGHTS).read_bytes()
    config = {**json.loads((folder / "config.json").read_text()), "scaling_factor": factor}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes(weights)
    assert describe_autoencoder(tmp_path) == {
        "class": "AutoencoderTiny",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "latent_channels": 4,
        "downsample": 4,
        "latents_mean": [0.0] * 4,
        "latents_std": [1 / factor] * 4,
    }
    assert Autoencoder.load(tmp_path).scale == LatentScale((0.0,) * 4, (1 / factor,) * 4)


def test_a_config_without_a_scaling_factor_has_that_of_its_class():
    std = {
        name: latent_scale({"_class_name": name, "latent_channels": 1}).std
        for name in ("AutoencoderKL", "AutoencoderTiny")
    }
    assert std == {"AutoencoderKL": (1 / 0.18215,), "AutoencoderTiny": (1.0,)}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstructions_are_as_good_in_every_precision_and_layout(trained, dtype, layout):
    folder, images = trained

    def reconstruct(autoencoder):
        mean, _ = autoencoder.encode(images_from_uint8(images)).chunk(2, dim=1)
        return autoencoder.decode(autoencoder.scale.scale(mean))

    plain = reconstruct(Autoencoder.load(folder))
    other = reconstruct(Autoencoder.load(folder, dtype=dtype, memory_format=MEMORY_FORMATS[layout]))
    assert psnr(images, plain) > 20  # else there would be nothing to lose
    assert psnr(images, other) == pytest.approx(psnr(images, plain), abs=0.1)
    assert psnr(plain, other) > (60 if dtype == torch.float32 else 40)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_weights_have_the_requested_layout_and_moments_are_always_contiguous(trained, layout):
    folder, images = trained
    autoencoder = Autoencoder.load(folder, memory_format=MEMORY_FORMATS[layout])
    convolution = autoencoder.module.encoder.conv_in.weight
    assert convolution.is_contiguous(memory_format=MEMORY_FORMATS[layout])
    moments = autoencoder.encode(images_from_uint8(images))
    assert moments.is_contiguous() and moments.dtype == torch.float32
    torch.testing.assert_close(moments, Autoencoder.load(folder).encode(images_from_uint8(images)), atol=1e-4, rtol=0)
