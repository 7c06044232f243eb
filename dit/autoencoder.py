"""The autoencoder between images and latents: a thin wrapper over diffusers' AutoencoderKL and AutoencoderTiny.

Images (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w): posterior mean, then log variance, unscaled ->
latents (N, C, h, w): drawn from the posterior and scaled, what a diffusion model sees -> images again.
A tiny autoencoder has no posterior: its latents are the mean, and the log variance is CERTAIN.
Source: Rombach et al. 2022 (arXiv 2112.10752).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit.autoencoder_size import STABLE_DIFFUSION
from dit.files import full_disk_as_oserror

WEIGHTS = "diffusion_pytorch_model"
"""Name of the weights in a diffusers folder, without its ending."""
SCALING_FACTORS = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
"""The classes of diffusers that are understood, and the scaling factor of each whose config names none."""
CERTAIN = -30.0
"""Log variance of a deterministic latent: the lowest that draws are made with, a deviation of 3e-7."""
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Layouts of weights and activations by their names in recipes."""


@dataclass(frozen=True)
class LatentScale:
    """How raw latents become the model's: (latents - mean) / std, per channel. See `latent_scale`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def scale(self, latents: Tensor) -> Tensor:
        """Raw latents (..., C, h, w) -> scaled latents."""
        return (latents - _per_channel(self.mean, latents)) / _per_channel(self.std, latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Scaled latents (..., C, h, w) -> raw latents."""
        return latents * _per_channel(self.std, latents) + _per_channel(self.mean, latents)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw raw latents (N, C, h, w) from the posterior that moments (N, 2C, h, w) describe.

    The log variance is clamped to [-30, 20] as in diffusers' DiagonalGaussianDistribution.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def images_from_uint8(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) in 0..255 -> float32 (N, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def images_to_uint8(images: Tensor) -> Tensor:
    """float (N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3): clamp(127.5 x + 128, 0, 255), then truncate."""
    return (images.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def locate_autoencoder(id: str, *, download: bool = True) -> Path:
    """Local folder of a diffusers autoencoder: a path as it is, a hub id downloaded or from the cache."""
    if Path(id).is_dir():
        return Path(id)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(id, allow_patterns=["config.json", f"{WEIGHTS}.*"], local_files_only=not download)
        )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"no autoencoder at {id!r}: expected a diffusers AutoencoderKL folder, or a hub id that is cached or can "
            f"be downloaded ({reason[0]}). Check the path, or leave autoencoder.id out and set [autoencoder.train]"
        ) from None


def record_autoencoder(id: str, latent_channels: int) -> dict:
    """What a checkpoint records of an autoencoder that may not be at hand: its digest only if it is on this machine.

    Raises FileNotFoundError for one that is neither here nor among Stable Diffusion's, and ValueError if its latents
    have other channels than latent_channels.
    """
    folder = Path(id).absolute() if Path(id).is_dir() else _cached(id)
    if folder is not None:
        described = {"id": str(folder) if Path(id).is_dir() else id, **describe_autoencoder(folder)}
    elif id in STABLE_DIFFUSION:
        unscaled = {"latents_mean": [0.0] * 4, "latents_std": [1 / 0.18215] * 4}
        described = {"id": id, "class": "AutoencoderKL", "sha256": None, "latent_channels": 4, "downsample": 8}
        described |= unscaled
    else:
        raise FileNotFoundError(
            f"no autoencoder at {id!r} on this machine: expected a diffusers AutoencoderKL folder, a hub id that is "
            f"cached, or one of {', '.join(STABLE_DIFFUSION)}. Check the path, or download it first"
        )
    if described["latent_channels"] != latent_channels:
        raise ValueError(
            f"the autoencoder {id!r} makes latents of {described['latent_channels']} channels, but the model expects "
            f"{latent_channels}: give the autoencoder that the model was trained with"
        )
    return described


def _cached(id: str) -> Path | None:
    """Folder of a hub id's snapshot on this machine, if its config and weights are there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(id, local_files_only=True))
    except Exception:  # not a hub id, or not cached: the hub's library has an error for each
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob(f"{WEIGHTS}.*")) else None


def describe_autoencoder(folder: Path) -> dict:
    """Identity, shape and scale, as latent data sets and checkpoints record them; reads no weights into memory."""
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = next(folder.glob(f"{WEIGHTS}.safetensors"), None) or next(folder.glob(f"{WEIGHTS}.bin"))
    except (FileNotFoundError, StopIteration):
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is no diffusers autoencoder: found {found}; expected config.json and {WEIGHTS}.safetensors"
        ) from None
    name = autoencoder_class(config, folder)
    with open(weights, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    scale = latent_scale(config)
    stages = config["block_out_channels" if name == "AutoencoderKL" else "encoder_block_out_channels"]
    return {
        "class": name,
        "sha256": sha256,
        "latent_channels": config["latent_channels"],
        "downsample": 2 ** (len(stages) - 1),
        "latents_mean": list(scale.mean),
        "latents_std": list(scale.std),
    }


def autoencoder_class(config: dict, folder: Path) -> str:
    """Name of the diffusers class that a config names. Raises ValueError if it is not understood."""
    name = config.get("_class_name", "AutoencoderKL")
    if name not in SCALING_FACTORS:
        raise ValueError(
            f"{folder} is an autoencoder of class {name!r}, expected {' or '.join(SCALING_FACTORS)}: choose another, "
            "such as stabilityai/sd-vae-ft-ema or madebyollin/taesd"
        )
    return name


class Autoencoder:
    """A diffusers AutoencoderKL or AutoencoderTiny, frozen, with its scale."""

    def __init__(self, module: Any):
        self.module = module.eval().requires_grad_(False)
        self.scale = latent_scale(module.config)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        """Load from a diffusers folder (see `locate_autoencoder`).

        dtype, memory_format: bfloat16 and channels_last are faster on many devices and change the last digits of
        results, so neither is chosen here.
        """
        import diffusers

        config = json.loads((Path(folder) / "config.json").read_text())
        module = getattr(diffusers, autoencoder_class(config, Path(folder))).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
        )
        return cls(module.to(device, memory_format=memory_format))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w) float32, unscaled."""
        parameter = next(self.module.parameters())
        encoded = self.module.encode(images.to(parameter.device, parameter.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters.float().contiguous()
        latents = encoded.latents.float()
        return torch.cat([latents, torch.full_like(latents, CERTAIN)], dim=1).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> uint8 images (N, H, W, 3)."""
        parameter = next(self.module.parameters())
        raw = self.scale.unscale(latents.float()).to(parameter.device, parameter.dtype)
        return images_to_uint8(self.module.decode(raw).sample)


def latent_scale(config) -> LatentScale:
    """Scale of a diffusers config, applied as its pipelines do.

    (latents - latents_mean) * scaling_factor / latents_std where the config has statistics of the channels, as in
    Stable Diffusion XL's image-to-image pipeline; else (latents - shift_factor) * scaling_factor, as in Stable
    Diffusion 3's. GLM-Image's pipeline leaves the factor out of the former.
    """
    channels = config["latent_channels"]
    factor = config.get("scaling_factor") or SCALING_FACTORS[config.get("_class_name", "AutoencoderKL")]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = (config.get("shift_factor") or 0.0,) * channels, (1.0,) * channels
    return LatentScale(tuple(map(float, mean)), tuple(value / factor for value in std))


def create_autoencoder(*, image_size: int, latent_channels: int, downsample: int, width: int) -> Any:
    """A small AutoencoderKL for a domain that no pretrained one fits: one resnet per level, no attention.

    width: channels at full resolution, doubled at the lower ones. downsample: a power of two.
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


class AutoencoderObjective(nn.Module):
    """Reconstruction error plus a small KL term (Rombach et al. 2022, appendix G), as one forward pass."""

    def __init__(self, autoencoder: Any, kl_weight: float):
        super().__init__()
        self.autoencoder: Any = autoencoder
        self.kl_weight = kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) in [-1, 1], noise (N, C, h, w) -> scalars loss, mse, kl (nats per image)."""
        posterior = self.autoencoder.encode(images).latent_dist
        reconstruction = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        mse = nn.functional.mse_loss(reconstruction, images)
        kl = posterior.kl().mean()
        return {"loss": mse + self.kl_weight * kl / images[0].numel(), "mse": mse, "kl": kl}


def psnr(reference: Tensor, reconstruction: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images: 10 log10(255^2 / mean squared error)."""
    error = (reference.double() - reconstruction.double()).square().mean()
    return float(10 * torch.log10(255.0**2 / error))


def save_autoencoder(module: Any, folder: Path, scale: LatentScale) -> None:
    """Write diffusers' own folder format, with the latent statistics in its config."""
    module.register_to_config(latents_mean=list(scale.mean), latents_std=list(scale.std), scaling_factor=1.0)
    with full_disk_as_oserror(folder):
        module.save_pretrained(folder)
    # diffusers writes its version and the path it came from; the path would make equal files differ.
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("_name_or_path", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
