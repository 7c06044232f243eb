import hashlib
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dit.autoencoder import (
    Autoencoder,
    LatentScale,
    create_autoencoder,
    describe_autoencoder,
    images_from_uint8,
    images_to_uint8,
    latent_scale,
    locate_autoencoder,
    look_up_pixels,
    psnr,
    sample_posterior,
    save_autoencoder,
)
from dit.autoencoders.kinds import describe_shape
from dit.autoencoders.objective import AutoencoderObjective
from dit.autoencoders.size import read_config
from dit.formats.diffusers_pipeline import pipeline_scale
from raydit.errors import InvalidInput

SCALE = LatentScale((0.5, -1.0, 2.0, 0.0), (2.0, 0.25, 1.0, 4.0))


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return create_autoencoder(image_size=16, latent_channels=4, downsample=4, width=8).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16) * 2 - 1


def test_unscale_is_the_inverse_of_scale():
    latents = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(SCALE.unscale(SCALE.scale(latents)), latents)
    torch.testing.assert_close(SCALE.scale(SCALE.unscale(latents)), latents)


def test_scale_subtracts_the_mean_and_divides_by_the_standard_deviation_of_each_channel():
    latents = torch.ones(1, 4, 2, 2)
    scaled = SCALE.scale(latents)
    assert scaled[0, :, 0, 0].tolist() == [0.25, 8.0, -1.0, 0.25]
    assert torch.equal(scaled, scaled[:, :, :1, :1].expand_as(scaled))
    assert torch.equal(SCALE.scale(latents[0]), scaled[0])


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"scaling_factor": 0.18215}, 0.0, 1 / 0.18215),
        ({"scaling_factor": 0.13025, "shift_factor": None, "latents_mean": None}, 0.0, 1 / 0.13025),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 1 / 0.3611),
        ({}, 0.0, 1 / 0.18215),
    ],
)
def test_scaling_and_shift_factor_apply_as_diffusers_pipelines_do(config, mean, std):
    scale = latent_scale({"latent_channels": 4, **config})
    assert scale.mean == (mean,) * 4
    assert scale.std == pytest.approx((std,) * 4)
    latents = torch.randn(1, 4, 2, 2)
    expected = (latents - (config.get("shift_factor") or 0)) * config.get("scaling_factor", 0.18215)
    torch.testing.assert_close(scale.scale(latents), expected)


def test_statistics_of_the_channels_and_the_factor_apply_together_as_diffusers_pipelines_do():
    """Encoding and decoding are those of pipeline_stable_diffusion_xl_img2img.py, which ignores the shift."""
    mean, std, factor = [-1.6, 1.1], [8.4, 5.0], 0.5
    config = {"latent_channels": 2, "latents_mean": mean, "latents_std": std, "scaling_factor": factor}
    scale = latent_scale({**config, "shift_factor": 9.0})
    raw = torch.randn(3, 2, 4, 4)
    means, stds = (torch.tensor(values).view(1, 2, 1, 1) for values in (mean, std))
    torch.testing.assert_close(scale.scale(raw), (raw - means) * factor / stds)
    torch.testing.assert_close(scale.unscale(raw), raw * stds / factor + means)


@pytest.mark.parametrize("absent", ["latents_mean", "latents_std"])
def test_a_mean_without_a_standard_deviation_is_ignored_and_vice_versa(absent):
    config = {"latent_channels": 2, "latents_mean": [1, 2], "latents_std": [3, 4], "scaling_factor": 0.5}
    assert latent_scale({**config, absent: None}) == LatentScale((0.0, 0.0), (2.0, 2.0))


def test_all_256_values_survive_conversion_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    floats = images_from_uint8(values)
    assert floats.shape == (1, 3, 16, 16)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(images_to_uint8(floats), values)


def test_values_looked_up_are_those_computed_to_the_bit():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    looked_up, computed = look_up_pixels(values).permute(0, 3, 1, 2), images_from_uint8(values)
    assert torch.equal(looked_up, computed)
    contiguous = values.contiguous()  # other layouts would choose other convolutions
    assert look_up_pixels(contiguous).permute(0, 3, 1, 2).stride() == images_from_uint8(contiguous).stride()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-1.0, 0), (1.0, 255), (0.0, 128), (-7.0, 0), (7.0, 255), (-0.004, 127), (0.0078, 128), (0.0079, 129)],
)
def test_floats_convert_to_bytes_as_127_5_x_plus_128_truncated(value, expected):
    image = torch.full((1, 3, 1, 1), value)
    assert images_to_uint8(image).flatten().tolist() == [expected] * 3
    assert expected == min(255, max(0, math.floor(127.5 * value + 128)))


def test_conversion_between_bytes_and_floats_permutes_the_axes():
    images = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    assert images_from_uint8(images).shape == (2, 3, 4, 6)
    assert torch.equal(images_from_uint8(images)[1, 2], images[1, :, :, 2] / 127.5 - 1)


def test_a_posterior_sample_is_the_mean_plus_noise_times_the_standard_deviation():
    mean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    log_variance = torch.full_like(mean, 2 * math.log(3.0))
    draw = sample_posterior(torch.cat([mean, log_variance], dim=1), noise)
    torch.testing.assert_close(draw, mean + 3 * noise)
    assert draw.dtype == torch.float32
    assert torch.equal(sample_posterior(torch.cat([mean, log_variance], dim=1), torch.zeros_like(noise)), mean)


def test_log_variances_are_clamped_as_in_diffusers():
    moments = torch.cat([torch.randn(1, 2, 2, 2), torch.tensor([-100.0, 50.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)], 1)
    noise = torch.randn(1, 2, 2, 2)
    posterior = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(sample_posterior(moments, noise), posterior.mean + posterior.std * noise)


def test_moments_are_the_parameters_of_diffusers_posterior(module, images):
    moments = Autoencoder(module).encode(images)
    with torch.no_grad():
        posterior = module.encode(images).latent_dist
    assert moments.shape == (2, 8, 4, 4) and moments.dtype == torch.float32
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))


def test_decoding_unscales_first(module):
    autoencoder = Autoencoder(module)
    autoencoder.scale = SCALE
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = images_to_uint8(module.decode(SCALE.unscale(latents)).sample)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == (2, 16, 16, 3) and decoded.dtype == torch.uint8
    assert torch.equal(decoded, expected)


def test_the_objective_is_the_error_plus_the_weighted_kl(module, images):
    noise = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        terms = AutoencoderObjective(module, kl_weight=0.5)(images, noise)
        absolute = AutoencoderObjective(module, kl_weight=0.5, reconstruction="l1")(images, noise)
        mean, log_variance = module.encode(images).latent_dist.parameters.chunk(2, dim=1)
        reconstruction = module.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
    mse = (reconstruction - images).square().mean()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(terms["mse"], mse)
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["loss"], mse + 0.5 * kl / (3 * 16 * 16))
    torch.testing.assert_close(absolute["loss"], (reconstruction - images).abs().mean() + 0.5 * kl / (3 * 16 * 16))
    assert terms.keys() == {"loss", "mse", "kl"} and absolute.keys() == {*terms, "l1"}


def test_a_saved_autoencoder_loads_with_plain_diffusers_and_has_its_statistics(module, images, tmp_path):
    save_autoencoder(module, tmp_path, SCALE)
    plain = AutoencoderKL.from_pretrained(tmp_path, local_files_only=True)
    assert tuple(plain.config.latents_mean) == SCALE.mean
    assert tuple(plain.config.latents_std) == SCALE.std
    loaded = Autoencoder.load(tmp_path)
    assert loaded.scale == SCALE
    assert torch.equal(loaded.encode(images), Autoencoder(module).encode(images))
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_a_description_agrees_with_the_files(module, tmp_path):
    save_autoencoder(module, tmp_path, SCALE)
    weights = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    assert describe_autoencoder(tmp_path) == {
        "class": "AutoencoderKL",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "latent_channels": 4,
        "downsample": 4,
        "latents_mean": list(SCALE.mean),
        "latents_std": list(SCALE.std),
    }


def test_a_saved_autoencoder_has_the_scale_it_was_saved_with_whatever_its_factor_was(tmp_path):
    module = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, latent_channels=4, scaling_factor=0.18215)
    save_autoencoder(module, tmp_path, SCALE)
    assert Autoencoder.load(tmp_path).scale == SCALE
    assert describe_autoencoder(tmp_path)["latents_std"] == list(SCALE.std)


def test_equal_autoencoders_give_equal_files_in_any_folder(module, tmp_path):
    for name in ("first", "second"):
        save_autoencoder(module, tmp_path / name, SCALE)
    reloaded = AutoencoderKL.from_pretrained(tmp_path / "first", local_files_only=True)
    save_autoencoder(reloaded, tmp_path / "third", SCALE)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
        assert file.read_bytes() == (tmp_path / "third" / file.name).read_bytes()


def test_an_existing_folder_is_located_without_the_hub(tmp_path):
    assert locate_autoencoder(str(tmp_path)) == tmp_path


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at '.*none' .*, expected a diffusers .*Check the"):
        locate_autoencoder(str(tmp_path / "none"))


@pytest.mark.parametrize("present", [[], ["config.json"], ["diffusion_pytorch_model.safetensors"]])
def test_a_folder_without_an_autoencoder_is_refused_with_its_content(tmp_path, present):
    for name in present:
        (tmp_path / name).write_text("{}")
    found = ", ".join(present) or "nothing"
    with pytest.raises(
        FileNotFoundError, match=f"is not a diffusers autoencoder: it contains {found}, expected config"
    ):
        describe_autoencoder(tmp_path)


def test_an_autoencoder_of_another_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for call in (describe_autoencoder, Autoencoder.load):
        with pytest.raises(
            ValueError, match=r"'AutoencoderOobleck', expected AutoencoderKL, .* or AutoencoderRAE\. Choose"
        ):
            call(tmp_path)


@pytest.mark.parametrize("field", ["latent_channels", "block_out_channels"])
def test_a_config_without_a_field_that_gives_the_size_is_refused(module, tmp_path, field):
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop(field)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (describe_autoencoder, lambda folder: describe_shape(read_config(folder))):
        with pytest.raises(InvalidInput, match=f"the config.json of an AutoencoderKL: found no {field}, expected all"):
            read(tmp_path)


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_a_new_autoencoder_has_the_requested_shape(downsample):
    small = create_autoencoder(image_size=16, latent_channels=3, downsample=downsample, width=8)
    moments = Autoencoder(small).encode(torch.zeros(1, 3, 16, 16))
    assert moments.shape == (1, 6, 16 // downsample, 16 // downsample)


@pytest.mark.parametrize("error", [1, 5, 255])
def test_psnr_of_a_constant_error_is_the_closed_form(error):
    first = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    second = torch.full_like(first, error)
    assert psnr(first, second) == pytest.approx(20 * math.log10(255 / error), abs=1e-9)
    assert psnr(second, first) == psnr(first, second)


def test_psnr_of_equal_images_is_finite():
    """JSON has no infinity: the report of an autoencoder that reconstructs perfectly could not be written."""
    image = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    assert psnr(image, image) == pytest.approx(10 * math.log10(255**2 / 1e-10), abs=1e-9)


@pytest.mark.parametrize("factor", ["0.18", [1], -1, float("inf"), float("nan"), True])
def test_a_scaling_factor_that_is_no_number_above_0_is_refused(tmp_path, factor):
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": factor}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (lambda: latent_scale(config), lambda: pipeline_scale(tmp_path)):
        with pytest.raises(InvalidInput, match="found scaling_factor .*, expected a number above 0"):
            read()


def test_a_scaling_factor_that_is_left_out_is_that_of_the_class(tmp_path):
    config = {"_class_name": "AutoencoderKL", "latent_channels": 2, "scaling_factor": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert latent_scale(config).std == pipeline_scale(tmp_path).std == (1 / 0.18215,) * 2
