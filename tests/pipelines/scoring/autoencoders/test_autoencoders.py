"""Judging an autoencoder without Ray: what an actor records, against diffusers and numpy, whatever the shards."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny import BROKEN
from tiny_autoencoders import CHANNELS, write_autoencoder
from tiny_checkpoint import tiny_output

from evaluation.extractors import Features
from evaluation.image_quality import ssim
from pipelines.images.preprocess import read_cropped
from pipelines.scoring.autoencoders.autoencoder_actors import (
    ReconstructedShard,
    ReconstructingActor,
    read_reconstructed,
)
from pipelines.scoring.autoencoders.autoencoder_evaluation import (
    AutoencoderEvaluation,
    chosen_images,
    default_size,
    draw_reconstructions,
    find_handle,
    reduce_records,
)
from raydit.errors import InvalidInput


def mean_colours(images: torch.Tensor) -> Features:
    """An extractor that tells images apart. images: uint8 (N, 3, H, W)."""
    return Features(images.float().mean(dim=(2, 3)).numpy())


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The tiny recipe with an autoencoder in its output, and images that can all be read."""
    monkeypatch.setattr("evaluation.extractors.create_extractor", lambda *arguments: mean_colours)
    config = tiny_output(tmp_path, "images.held_out=0", "encode.batch_size=4")
    (tmp_path / "images" / BROKEN).unlink()
    return config


def evaluation_of(config, name=None, num=20, shard_rows=8):
    """The evaluation of an autoencoder by a folder's name; that of the output by default."""
    config = replace(config, evaluate=replace(config.evaluate, shard_rows=shard_rows))
    return AutoencoderEvaluation(find_handle(str(name or config.output)), config, *chosen_images(config.images, num))


def compute(evaluation):
    """Compute all shards in this process, by one actor."""
    actor = ReconstructingActor(evaluation.shared_images, evaluation.config.evaluate, evaluation.source)
    for shard in evaluation.shards:
        actor(shard)
    return reduce_records(evaluation.shards)


def test_reconstructions_are_those_of_diffusers(config):
    evaluation = evaluation_of(config)
    measured = compute(evaluation)
    images = read_cropped(evaluation.images, evaluation.listing.keys).images
    module = AutoencoderKL.from_pretrained(config.folder("autoencoder"))
    with torch.no_grad():
        posterior = module.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        decoded = module.decode(posterior.mean.half().float()).sample
    decoded = (decoded * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.abs(measured.decoded.astype(int) - decoded.numpy()).max() <= 1  # rounding, by another memory layout
    error = ((images.astype(float) - measured.decoded) ** 2).mean()
    assert measured.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)
    assert measured.ssim == pytest.approx(ssim(torch.from_numpy(images), torch.from_numpy(measured.decoded)), abs=1e-9)
    features = measured.features["efficientnet-lite0"]
    np.testing.assert_allclose(features.mean, measured.decoded.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(measured.originals, images)
    assert measured.moments_shape == (8, 8, 8) and "CPU, 1 thread, float32" in measured.device
    mean, std = posterior.mean.numpy(), posterior.std.numpy()
    spread = np.sqrt(mean.var(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(measured.latents.std, spread, rtol=0.1)
    assert measured.encode_seconds > 0 and measured.decode_seconds > 0


def test_what_is_measured_depends_on_no_shards(config):
    few, many = (compute(evaluation_of(config, shard_rows=rows)) for rows in (20, 3))
    assert (few.psnr, few.ssim) == pytest.approx((many.psnr, many.ssim), rel=1e-12)
    np.testing.assert_array_equal(few.decoded, many.decoded)
    for name in ("mean", "std", "kurtosis", "correlations"):
        np.testing.assert_allclose(getattr(few.latents, name), getattr(many.latents, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CHANNELS if name != "AutoencoderKL"])
def test_every_class_is_measured(config, name, tmp_path):
    write_autoencoder(name, tmp_path / name)
    evaluation = evaluation_of(config, tmp_path / name, num=10)
    measured = compute(evaluation)
    channels = CHANNELS[name] * (2 if name == "AutoencoderKLFlux2" else 1)
    assert measured.moments_shape == (channels, 4, 4) and len(measured.latents.mean) == CHANNELS[name]
    record = next(read_reconstructed(evaluation.shards))
    assert record.means.shape == record.stds.shape == (8, CHANNELS[name], 4, 4)
    assert (record.stds > 0).any() == (name == "AutoencoderKLFlux2")


def test_a_record_is_read_as_it_was_written(config, tmp_path):
    evaluation = evaluation_of(config, num=10)
    actor = ReconstructingActor(evaluation.shared_images, evaluation.config.evaluate, evaluation.source)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    record = actor.measure(images, range(3))
    record.write(str(tmp_path / "record.npz"))
    with open(tmp_path / "record.npz", "rb") as file:
        found = ReconstructedShard.read(file)
    assert vars(found.latents).keys() == vars(record.latents).keys()
    for name, value in (vars(record) | vars(record.latents)).items():
        if name not in ("latents", "features"):
            np.testing.assert_array_equal(vars(found).get(name, vars(found.latents).get(name)), value)
    assert [*found.features] == [*record.features] == ["efficientnet-lite0"]
    np.testing.assert_array_equal(found.features["efficientnet-lite0"], record.features["efficientnet-lite0"])


def test_an_evaluation_resumes_with_the_extractors_in_another_order(config, monkeypatch):
    def create(name, *arguments):
        return mean_colours if name == "efficientnet-lite0" else lambda images: Features(mean_colours(images)[0] * 2)

    monkeypatch.setattr("evaluation.extractors.create_extractor", create)
    names = ("efficientnet-lite0", "efficientnet-lite1")
    begun, resumed = (
        evaluation_of(replace(config, evaluate=replace(config.evaluate, extractor=order[0], extractors=order)))
        for order in (names, names[::-1])
    )
    assert begun.protocol.protocol_id == resumed.protocol.protocol_id
    for evaluation, shards in ((begun, begun.shards[:2]), (resumed, begun.shards[2:])):
        actor = ReconstructingActor(evaluation.shared_images, evaluation.config.evaluate, evaluation.source)
        for shard in shards:
            actor(shard)
    features = reduce_records(resumed.shards).features
    np.testing.assert_array_equal(features[names[1]].mean, 2 * features[names[0]].mean)


def test_unreadable_images_and_infinite_moments_are_refused(config, tmp_path):
    (tmp_path / "images" / BROKEN).write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=r"broken\.png"):
        compute(evaluation_of(config, num=None))
    actor = ReconstructingActor(config.images, config.evaluate, evaluation_of(config).source)
    with pytest.raises(InvalidInput, match="not finite in float16"):
        actor._means(np.full((1, 8, 2, 2), np.inf, np.float16))


def test_autoencoders_and_images_are_found_as_users_name_them(config, tmp_path):
    output = config.output
    for name in (output, f"{output}/autoencoder", f"{output}/autoencoder/"):
        assert evaluation_of(config, name).name == f"{output}/autoencoder"
    assert default_size(find_handle(output)) == 16
    plan = Path(output, "autoencoder", "plan.json")
    plan.write_text('{"identity": {"images": {"size": 12}}}')
    assert default_size(find_handle(output)) == 12  # the config's may be that of the autoencoder it started from
    plan.unlink()
    write_autoencoder("AutoencoderKL", tmp_path / "kl")
    plain = find_handle(str(tmp_path / "kl"))
    assert plain.id == str(tmp_path / "kl") and default_size(plain) == 256
    assert find_handle("owner/name").id == "owner/name"
    held_out = chosen_images(replace(config.images, held_out=0.3), None)[1]
    assert 0 < len(held_out) < 36 and len(chosen_images(config.images, None)[1]) == 36
    with pytest.raises(InvalidInput, match="--num 40"):
        chosen_images(config.images, 40)
    with pytest.raises(InvalidInput, match="at least 10"):
        _ = evaluation_of(config, num=9).protocol
    with pytest.raises(InvalidInput, match="multiple of 2"):
        _ = replace(evaluation_of(config), images=replace(config.images, size=15)).protocol


def test_a_picture_shows_each_autoencoder_and_its_difference():
    from io import BytesIO

    from PIL import Image

    images = np.full((3, 64, 64, 3), 100, np.uint8)
    picture = partial(draw_reconstructions, images, names=["a", "b"])
    pixels = np.asarray(Image.open(BytesIO(picture([images, images + 10]))))
    assert pixels.shape[0] == 5 * 66 + 2
    centres = [tuple(pixels[66 * row + 34, -30].tolist()) for row in range(5)]
    assert centres == [(100,) * 3, (100,) * 3, (0,) * 3, (110,) * 3, (40,) * 3]
