"""The scale of an autoencoder's latents: what they are divided by before a diffusion model sees them.

(latents - mean) / std, with one value per channel (C,), per position (C, H, W), or per channel of the p x p patches
of latent pixels (C p p,), whose channel c p p + y p + x is the pixel (y, x) of a patch in channel c
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.autoencoders.kinds import FLAT_SCALE, KINDS, class_of, flux2_patch, latent_channels, representation_grid
from raydit.errors import InvalidInput

SCALE_TENSORS = {
    "AutoencoderKLFlux2": ("bn.running_mean", "bn.running_var"),
    "AutoencoderRAE": ("_latents_mean", "_latents_std"),
}
"""Names of the tensors among the weights that hold the scale, by class; that of other classes is in the config."""
RAE_EPS = 1e-5
"""What AutoencoderRAE of diffusers adds to the standard deviation."""


@dataclass(frozen=True)
class LatentScale:
    """Scale of latents: (latents - mean) / std is the input of the diffusion model. See `latent_scale`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...] | None = None
    """(C, H, W) if there is a value for each position, in C order; None for one value per channel."""
    patch: int | None = None
    """Side in latent pixels of the patches whose channels have a value each; None without patches."""
    _tensors: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def scale(self, latents: Tensor) -> Tensor:
        """Scale latents (..., C, h, w) of the autoencoder for the diffusion model."""
        return (latents - self._tensor("mean", latents)) / self._tensor("std", latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Convert latents (..., C, h, w) of the diffusion model back to those of the autoencoder."""
        return latents * self._tensor("std", latents) + self._tensor("mean", latents)

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        """Return the means or the standard deviations in a shape that multiplies `like`; kept, for the next batch."""
        key = (name, like.dtype, like.device, tuple(like.shape[-2:]) if self.patch else None)
        if key not in self._tensors:
            values = torch.tensor(getattr(self, name), dtype=like.dtype, device=like.device)
            self._tensors[key] = self._spread(values, *like.shape[-2:])
        return self._tensors[key]

    def _spread(self, values: Tensor, height: int, width: int) -> Tensor:
        if self.patch is None:
            return values.view(self.shape or (-1, 1, 1))
        side = self.patch
        return values.view(-1, side, side).repeat(1, height // side, width // side)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tensors, which another process has no device for."""
        return self.__dict__ | {"_tensors": {}}

    def to_json(self) -> dict[str, Any]:
        """Return mean and std as nested lists of the scale's shape, and the patch if there is one."""
        shape = self.shape or (-1,)
        values = {name: np.reshape(getattr(self, name), shape).tolist() for name in ("mean", "std")}
        return values | ({} if self.patch is None else {"patch": self.patch})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LatentScale":
        """Read what `to_json` returns. Raises KeyError or ValueError for anything else."""
        mean, std = (np.asarray(content[name], np.float64) for name in ("mean", "std"))
        if mean.shape != std.shape or mean.ndim not in (1, 3):
            raise ValueError(f"scale: found mean of shape {mean.shape} and std of shape {std.shape}")
        shape = mean.shape if mean.ndim == 3 else None
        return cls(tuple(mean.ravel().tolist()), tuple(std.ravel().tolist()), shape, content.get("patch"))


def scale_of(record: Mapping[str, Any]) -> LatentScale:
    """Return the scale in the record of an autoencoder. Raises KeyError or ValueError if there is none."""
    if "scale" in record:
        return LatentScale.from_json(record["scale"])
    return LatentScale(tuple(record["latents_mean"]), tuple(record["latents_std"]))


def record_scale(class_name: str, scale: LatentScale) -> dict[str, Any]:
    """Return the fields of an autoencoder's record that hold its scale: those of the class, which `scale_of` reads."""
    if class_name in FLAT_SCALE:
        return {"latents_mean": list(scale.mean), "latents_std": list(scale.std)}
    return {"scale": scale.to_json()}


def latent_scale(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> LatentScale:
    """Return the scale that an autoencoder's diffusers config describes, as diffusers' pipelines apply it.

    tensors: SCALE_TENSORS of the class, or all weights. If the config has statistics of the channels, the scaled
    latents are (latents - latents_mean) * scaling_factor / latents_std, as in Stable Diffusion XL's image-to-image
    pipeline (GLM-Image's pipeline omits the factor). Otherwise they are (latents - shift_factor) * scaling_factor, as
    in Stable Diffusion 3. Raises InvalidInput for statistics of another number of channels, and for any that are not
    finite numbers or, of standard deviations, not above 0.
    """
    readers = {"AutoencoderKLFlux2": _flux2_scale, "AutoencoderRAE": _representation_scale}
    scale = readers.get(class_of(config), _config_scale)(config, tensors or {})
    if not all(map(math.isfinite, scale.mean)) or not all(0 < value < math.inf for value in scale.std):
        raise InvalidInput(
            "the autoencoder's scale of latents: found means or standard deviations without a meaning",
            "finite means, and finite standard deviations above 0",
            "copy the autoencoder again",
        )
    return scale


def _config_scale(config: Mapping[str, Any], _: Mapping[str, Tensor]) -> LatentScale:
    """Return the scale of a class that has all of it in its config."""
    channels, default = latent_channels(config), KINDS[class_of(config)].scaling_factor
    assert default is not None, "classes without a factor have their scale among the weights"
    factor = scaling_factor(config, default)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = _numbers(config, "shift_factor", 0.0).ravel().tolist() * channels, [1.0] * channels
    else:  # some configs hold them as (1, C, 1, 1)
        mean, std = (_numbers(config, name, 0.0).ravel().tolist() for name in ("latents_mean", "latents_std"))
    if len(mean) != len(std) or len(mean) != channels:
        raise InvalidInput(
            f"config.json: found latents_mean of {len(mean)} and latents_std of {len(std)} values",
            f"one for each of the {channels} channels of the latents",
            "copy the autoencoder again",
        )
    return LatentScale(tuple(mean), tuple(value / factor for value in std))


def scaling_factor(config: Mapping[str, Any], default: float) -> float:
    """Return the factor by which an autoencoder's config scales latents. default: of its class.

    Raises InvalidInput for anything but a finite number above 0.
    """
    factor = config.get("scaling_factor") or default
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise InvalidInput(
            f"config.json: found scaling_factor {str(factor)[:80]}", "a number above 0", "copy the autoencoder again"
        )
    return factor


def _numbers(config: Mapping[str, Any], name: str, default: float) -> np.ndarray:
    """Return a number or nested lists of numbers in a config as float64. Raises InvalidInput for anything else."""
    values = config.get(name)
    try:
        return np.asarray(default if values is None else values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInput(
            f"config.json: found {name} {str(values)[:80]}", "numbers", "copy the autoencoder again"
        ) from None


def _flux2_scale(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LatentScale:
    """Return the running statistics of the batch norm of patches, as Flux2Pipeline applies them."""
    patch = flux2_patch(config)[0]
    count = latent_channels(config) * patch**2
    # An untrained batch norm has these values, and takes no part in encoding and decoding.
    mean = tensors.get("bn.running_mean", torch.zeros(count)).float().cpu()
    variance = tensors.get("bn.running_var", torch.ones(count)).float().cpu()
    if mean.shape != (count,) or variance.shape != (count,):
        raise _other_shape("bn.running_mean", mean, f"({count},)")
    std = torch.sqrt(variance + config.get("batch_norm_eps", 1e-4))
    return LatentScale(_shortest(mean), _shortest(std), patch=patch)


def _representation_scale(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LatentScale:
    """Return the normalisation that AutoencoderRAE applies to the features of its encoder."""
    channels, side = latent_channels(config), representation_grid(config).side
    mean, std = (
        torch.as_tensor(tensors[f"_{name}"] if f"_{name}" in tensors else _numbers(config, name, default)).float().cpu()
        for name, default in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    std = (std + RAE_EPS) / scaling_factor(config, 1.0)
    try:
        means, stds = (value.expand(1, channels, side, side)[0] for value in (mean, std))
    except RuntimeError:
        raise _other_shape("_latents_mean", mean, f"({channels}, {side}, {side})") from None
    if all(value.numel() == 1 or value.shape[-2:] == (1, 1) for value in (mean, std)):
        return LatentScale(_shortest(means[:, 0, 0]), _shortest(stds[:, 0, 0]))
    return LatentScale(_shortest(means), _shortest(stds), (channels, side, side))


def _shortest(values: Tensor) -> tuple[float, ...]:
    """Return the float32 numbers with the fewest digits that are these, because records hold them as text."""
    return tuple(values.numpy().ravel().astype(str).astype(np.float64).tolist())


def _other_shape(name: str, found: Tensor, expected: str) -> InvalidInput:
    return InvalidInput(
        f"the weights of the autoencoder: found {name} of shape {tuple(found.shape)}",
        expected,
        "copy the autoencoder again",
    )


def remove_own_scale(module: Any) -> None:
    """Change an AutoencoderRAE of diffusers in place so that it takes and returns unscaled latents.

    Its scale is `LatentScale`'s to apply, once. In bfloat16 its own would be rounded as well. It divides by its own
    standard deviation plus RAE_EPS, which becomes 1 in every dtype.
    """
    like = module._latents_std
    module._latents_mean = torch.zeros(1, dtype=like.dtype, device=like.device)
    module._latents_std = torch.full(
        (1,), 1 - RAE_EPS, dtype=like.dtype, device=like.device
    )  # to which it adds RAE_EPS
    module.register_to_config(scaling_factor=1.0)
