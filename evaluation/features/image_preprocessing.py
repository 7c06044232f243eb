"""From uint8 images to the input of a network: resize, centre crop and normalisation, equal on every device up to
rounding.

Libraries resize with PIL on the CPU, which rounds to whole grey levels after each of two passes. Here torch resizes
with the same antialiased kernels and rounds nowhere, so that a GPU and a CPU agree to rounding; values that overshoot
are clamped, as PIL's are. Features therefore differ from the library's by the effect of up to half a grey level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to an image before a network sees it."""

    resize: int | tuple[int, int] | None
    """Length of the shorter side in pixels, or (height, width); None: images are not resized."""
    crop: tuple[int, int] | None
    """(height, width) of the centre that is kept; None: all of the image."""
    rounds_crop: bool = True
    """Whether half a pixel at the edges of the crop is rounded, as in torchvision, or cut off, as in transformers."""
    interpolation: Interpolation
    scale: float
    """Factor of pixel values in [0, 255], before mean and std."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        """Say everything in words, as protocols record it."""
        steps = []
        if self.resize is not None:
            size = f"shorter side {self.resize}" if isinstance(self.resize, int) else f"{_size(self.resize)}"
            antialiased = "" if self.interpolation == "nearest" else ", antialiased"
            steps.append(f"resize to {size}, {self.interpolation}{antialiased}")
        if self.crop is not None:
            steps.append(f"centre crop {_size(self.crop)}{'' if self.rounds_crop else ', truncated'}")
        steps.append(f"scale {self.scale:.9g}, mean {_numbers(self.mean)}, std {_numbers(self.std)}")
        return "; ".join(steps)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the input of the network, float32 (N, 3, h, w). images: uint8 (N, 3, H, W).

        Raises InvalidInput for images that are smaller than the crop.
        """
        x = self._crop(self._resize(images.float()))
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x * self.scale - mean) / std

    def _resize(self, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        size = self._target(*x.shape[-2:])
        if size == tuple(x.shape[-2:]):
            return x
        if self.interpolation == "nearest":
            return F.interpolate(x, size=size, mode="nearest-exact")
        resized = F.interpolate(x, size=size, mode=self.interpolation, align_corners=False, antialias=True)
        return resized.clamp(0, 255)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Return the size after resizing; the longer side is truncated, as torchvision does."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        scaled = int(self.resize * long / short)
        return (scaled, self.resize) if height > width else (self.resize, scaled)

    def _crop(self, x: Tensor) -> Tensor:
        if self.crop is None:
            return x
        (height, width), (tall, wide) = self.crop, x.shape[-2:]
        if tall < height or wide < width:
            raise InvalidInput(
                f"images of {tall} x {wide} pixels before a centre crop to {_size(self.crop)}",
                "images that are at least as large",
                "choose an extractor that resizes its images, or larger images",
            )
        margins = (tall - height) / 2, (wide - width) / 2
        top, left = (round(margin) if self.rounds_crop else int(margin) for margin in margins)
        return x[..., top : top + height, left : left + width]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.9g}" for value in values)
