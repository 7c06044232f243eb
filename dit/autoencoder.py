"""The autoencoder between images and latents: a thin wrapper around diffusers' classes (`dit.autoencoders.kinds`).

    images   (N, 3, H, W) in [-1, 1]
    moments  (N, 2C, h, w) posterior mean, then log variance, unscaled; (N, C, h, w) if the posterior is deterministic
    latents  (N, C, h, w) drawn from the posterior and scaled: the input of a diffusion model

An AutoencoderTiny has no posterior: the mean is its latents, and the log variance is DETERMINISTIC_LOG_VARIANCE.
Sources: Rombach et al. 2022 (arXiv 2112.10752); DC-AE, Chen et al. 2024 (arXiv 2410.10733); RAE, Zheng et al. 2025
(arXiv 2510.11690).
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.autoencoders.kinds import (
    KINDS,
    autoencoder_class,
    class_of,
    describe_shape,
    import_class,
    is_deterministic,
    latent_side,
    require_installed,
    require_latent_size,
)
from dit.autoencoders.latent_scale import SCALE_TENSORS, LatentScale, latent_scale, record_scale, remove_own_scale
from dit.autoencoders.size import STABLE_DIFFUSION, read_config
from dit.files import translate_full_disk
from dit.formats.autoencoder_digests import config_sha256, further_digests
from dit.formats.diffusers_files import WEIGHTS, DiffusersWeights, find_weights, look_for_weights
from dit.hub import fetch_snapshot, split_revision
from raydit.errors import DISK_REMEDIES, InvalidInput, NotFound

VAE = "vae"
"""Folder of the autoencoder in a diffusers pipeline."""
_OTHER_AUTOENCODER = "copy the autoencoder again, or choose another one"
DETERMINISTIC_LOG_VARIANCE = -30.0
"""Log variance of deterministic latents: the lower limit in `sample_posterior`, a standard deviation of 3e-7."""
LEAST_SQUARED_ERROR = 1e-10
"""Least mean squared error of uint8 images in a peak signal-to-noise ratio, which is 148 dB then."""
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Memory layouts of weights and activations by their names in recipes."""


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw unscaled latents (N, C, h, w) from the posterior that moments (N, 2C, h, w) describe.

    noise: (N, C, h, w), standard normal; of no effect on moments (N, C, h, w), which are deterministic latents.
    The log variance is clamped to [-30, 20], as in diffusers' DiagonalGaussianDistribution.
    """
    if moments.shape == noise.shape:
        return moments.float()
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def images_from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 images (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1], with the same bits on every device."""
    by_pixel = _pixels_from_bytes(images) if images.device.type == "cpu" else look_up_pixels(images)
    return by_pixel.permute(0, 3, 1, 2)


def _pixels_from_bytes(values: Tensor) -> Tensor:
    return values.float() / 127.5 - 1.0


def look_up_pixels(images: Tensor) -> Tensor:
    """Return the float32 values of uint8 images by a table from the CPU, in the same shape and on the same device.

    A GPU would divide by multiplying by the rounded reciprocal, with other last bits.
    """
    return torch.nn.functional.embedding(images.int(), _pixel_values(images.device)).squeeze(-1)


@cache
def _pixel_values(device: torch.device) -> Tensor:
    """Return the float32 values of the 256 bytes, (256, 1)."""
    return _pixels_from_bytes(torch.arange(256)).unsqueeze(1).to(device)


def images_to_uint8(images: Tensor) -> Tensor:
    """Convert float images (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3).

    Values are clamp(127.5 x + 128, 0, 255), truncated.
    """
    return (images.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def locate_autoencoder(id: str, *, download: bool = True) -> Path:
    """Return the local folder of a diffusers autoencoder, given a path or a hub id; of a pipeline, its vae/ folder.

    A hub id may name a version, OWNER/NAME@REVISION; a folder of that name comes first. The files of a hub id come
    from the cache, or are downloaded if `download`. Raises NotFound if there is neither, and an OSError of the system
    if the cache is full or may not be written.
    """
    if Path(id).is_dir():
        return _vae_of(Path(id))
    files = ["config.json", f"{WEIGHTS}.*", f"{WEIGHTS}-*"]
    patterns = [*files, "model_index.json", *(f"{VAE}/{name}" for name in files)]
    try:
        return _vae_of(fetch_snapshot(id, patterns, download=download))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_REMEDIES:
            raise  # the id may be right
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise NotFound(
            f"no autoencoder at {id!r} ({reason[0]})",
            "a diffusers autoencoder folder, or a hub id that is cached or can be downloaded",
            "check the path, or remove autoencoder.id and set [autoencoder.train]",
        ) from None


def _vae_of(folder: Path) -> Path:
    """Return a folder, or the folder of the autoencoder in it if it holds a diffusers pipeline."""
    is_pipeline = (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()
    return folder / VAE if is_pipeline and (folder / VAE).is_dir() else folder


def record_autoencoder(id: str, latent_channels: int, latent_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return what an imported checkpoint records about its autoencoder; its digest only if it is on this machine.

    id: a hub id or a diffusers folder. latent_channels, latent_size: of the model; height and width in latent pixels.
    Raises NotFound if it is not on this machine and not one of Stable Diffusion's, and InvalidInput if its weights are
    not finite or its latents do not fit the model.
    """
    folder = find_autoencoder(id)
    if folder is not None:
        described = {"id": str(folder) if Path(id).is_dir() else id, **describe_autoencoder(folder)}
        described |= further_digests(folder)
        check_autoencoder(folder)
    elif split_revision(id)[0] in STABLE_DIFFUSION:
        unscaled = {"latents_mean": [0.0] * 4, "latents_std": [1 / 0.18215] * 4}
        described = {"id": id, "class": "AutoencoderKL", "sha256": None, "latent_channels": 4, "downsample": 8}
        described |= unscaled
    else:
        raise NotFound(
            f"no autoencoder at {id!r} on this machine",
            f"a diffusers autoencoder folder, a hub id that is cached, or one of {', '.join(STABLE_DIFFUSION)}",
            "check the path, or download it first",
        )
    if described["latent_channels"] != latent_channels:
        raise InvalidInput(
            f"the autoencoder {id!r} has latents of {described['latent_channels']} channels",
            f"{latent_channels} for this model",
            "pass the autoencoder that the model was trained with",
        )
    if latent_size is not None:
        require_latent_size(described, latent_size)
    return described


def find_autoencoder(id: str) -> Path | None:
    """Return the absolute folder of an autoencoder by its id, without downloading it; None if it is not here."""
    return _vae_of(Path(id).absolute()) if Path(id).is_dir() else _cached(id)


def _cached(id: str) -> Path | None:
    """Return the cached folder of a hub id, if it contains config and weights, or None."""
    try:
        folder = _vae_of(fetch_snapshot(id, download=False))
    except Exception:  # huggingface_hub raises different errors for invalid ids and for ids that are not cached
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob(f"{WEIGHTS}*")) else None


def describe_autoencoder(folder: Path) -> dict[str, Any]:
    """Return identity, shape and scale of a diffusers autoencoder, as latent data sets and checkpoints record them.

    The keys are class, sha256 (of the weights file; of shards see `DiffusersWeights.sha256`), those of `describe_shape`
    and those of `record_scale`. Raises NotFound if config or weights are missing, and InvalidInput for an unsupported
    class or a Git LFS pointer.
    """
    weights = look_for_weights(folder)
    if weights is None or not (folder / "config.json").is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise NotFound(
            f"{folder} is not a diffusers autoencoder: it contains {found}",
            f"config.json and {WEIGHTS}.safetensors",
            "check the path",
        )
    config = read_config(folder)
    name = autoencoder_class(config, folder)
    scale = record_scale(name, _read_scale(config, weights))
    return {"class": name, "sha256": weights.sha256, **describe_shape(config), **scale}


def _read_scale(config: Mapping[str, Any], weights: DiffusersWeights) -> LatentScale:
    """Return the scale of an autoencoder by its config, and by its weights where its class has it there."""
    return latent_scale(config, weights.read_named(SCALE_TENSORS.get(class_of(config), ())))


def is_same_autoencoder(folder: Path, recorded: Mapping[str, Any]) -> bool:
    """Return whether a folder's autoencoder has the recorded weights, in the same file or saved again, and config.

    recorded: "sha256" of the weights, and `further_digests`; None, or left out, where a record is older than they are.
    """
    config = recorded.get("config_sha256")
    if config is not None and config != config_sha256(folder):
        return False
    weights = find_weights(folder)
    tensors = recorded.get("tensors_sha256")
    return weights.sha256 == recorded["sha256"] or (tensors is not None and weights.tensors_sha256 == tensors)


def check_autoencoder(folder: Path) -> None:
    """Raise InvalidInput, naming file and tensor, if a weight of a diffusers autoencoder is NaN or infinite.

    Also raises it if the class of the autoencoder is not installed.
    """
    require_installed(autoencoder_class(read_config(folder), folder))
    find_weights(folder).read(_OTHER_AUTOENCODER)


class Autoencoder:
    """A frozen autoencoder of diffusers, with the scale of its latents, its pixel range and its image size."""

    def __init__(self, module: Any, scale: LatentScale | None = None) -> None:
        """Take over a module of one of KINDS; an AutoencoderRAE no longer scales its latents itself afterwards.

        scale: the one in its files, if the module's weights are rounded to another dtype.
        """
        self.module = module.eval().requires_grad_(False)
        name = type(module).__name__
        config = {**module.config, "_class_name": name}  # of a module that was not loaded, the config has no class
        self.scale = scale or latent_scale(config, module.state_dict())
        self._shape = describe_shape(config)
        self._unit_range = KINDS[name].unit_range
        if name == "AutoencoderRAE":
            remove_own_scale(module)

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents: C."""
        return self._shape["latent_channels"]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> "Autoencoder":
        """Load an autoencoder from a diffusers folder (see `locate_autoencoder`).

        dtype, memory_format: bfloat16 and channels_last are faster on many devices, but change the last digits of
        results, and are therefore not the defaults. Raises InvalidInput if a weight is not finite.
        """
        folder = _vae_of(Path(folder))
        weights = find_weights(folder)
        config = read_config(folder)
        kind = import_class(autoencoder_class(config, folder))
        module = weights.load(kind, config, dtype, _OTHER_AUTOENCODER)
        return cls(module.to(device, memory_format=memory_format), _read_scale(config, weights))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) in [-1, 1] as unscaled moments float32.

        They are (N, 2C, h, w), or (N, C, h, w) if the posterior is deterministic. Raises InvalidInput for images of
        another size than the only one that the autoencoder decodes.
        """
        if "image_size" in self._shape:
            latent_side(images.shape[-1], self._shape)
        parameter = next(self.module.parameters())
        pixels = (images + 1) / 2 if self._unit_range else images
        encoded = self.module.encode(pixels.to(parameter.device, parameter.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters.float().contiguous()
        if is_deterministic(self._shape):
            return encoded.latent.float().contiguous()
        latents = encoded.latents.float()
        return torch.cat([latents, torch.full_like(latents, DETERMINISTIC_LOG_VARIANCE)], dim=1).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (N, C, h, w), which must be finite, to uint8 images (N, H, W, 3).

        Raises InvalidInput if the autoencoder makes NaN of them, which would become black pixels.
        """
        parameter = next(self.module.parameters())
        raw = self.scale.unscale(latents.float()).to(parameter.device, parameter.dtype)
        images = self.module.decode(raw).sample
        images = images.float() * 2 - 1 if self._unit_range else images
        if not bool(torch.isfinite(images).all()):
            raise InvalidInput(
                "the autoencoder decodes finite latents to NaN or infinity", "finite pixels", _OTHER_AUTOENCODER
            )
        return images_to_uint8(images)


def create_autoencoder(*, image_size: int, latent_channels: int, downsample: int, width: int) -> Any:
    """Create a small AutoencoderKL, for domains that no pretrained one fits: one resnet per level, no attention.

    image_size: in pixels. downsample: image pixels per latent pixel along each side; a power of two.
    width: channels at full resolution; lower resolutions have twice as many.
    """
    from diffusers import AutoencoderKL

    levels = downsample.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(width,) + (2 * width,) * (levels - 1),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def psnr(reference: Tensor, reconstruction: Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 images in dB (see `error_in_db`)."""
    return error_in_db((reference.double() - reconstruction.double()).square().mean())


def error_in_db(mean_squared_error: Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 images in dB: 10 log10(255^2 / mean squared error).

    Errors below LEAST_SQUARED_ERROR count as that, so that the ratio of equal images is finite.
    """
    return float(10 * torch.log10(255.0**2 / mean_squared_error.clamp(min=LEAST_SQUARED_ERROR)))


def save_autoencoder(module: Any, folder: Path, scale: LatentScale) -> None:
    """Write an autoencoder as a diffusers folder, with `scale` as latent statistics in its config."""
    module.register_to_config(latents_mean=list(scale.mean), latents_std=list(scale.std), scaling_factor=1.0)
    with translate_full_disk(folder):
        module.save_pretrained(folder)
    # diffusers records the path that the module was loaded from, which would make equal files differ.
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("_name_or_path", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
