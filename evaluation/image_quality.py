"""Structural similarity (SSIM): how close images are to their originals, whatever made them."""

import torch
from torch import Tensor
from torch.nn import functional

from raydit.errors import InvalidInput

WINDOW = 11
"""Side of the Gaussian window of structural similarity in pixels."""
WINDOW_SIGMA = 1.5
"""Standard deviation of the window in pixels."""
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""Constants that keep the quotients finite, for values in [0, 255]."""
_BATCH = 64
"""Images whose maps are in memory at a time."""


def ssim(reference: Tensor, reconstruction: Tensor) -> float:
    """Return the mean structural similarity of images with values in [0, 255], uint8 or float (N, H, W, C).

    See structural_similarities. Raises InvalidInput if shapes differ or there are no images.
    """
    return float(structural_similarities(reference, reconstruction).mean())


def structural_similarities(reference: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the structural similarity of each image to its reference, float64 (N,), 1 for equal ones.

    reference, reconstruction: uint8 or float (N, H, W, C) with values in [0, 255]. The mean over all positions at which
    the 11 x 11 Gaussian window lies inside of the image, and over channels. Images of fewer than 11 pixels a side get
    the window of the largest odd side that fits. Source: Wang et al. 2004 (doi 10.1109/TIP.2003.819861), eq. 13 to 17,
    K1 = 0.01 and K2 = 0.03. Raises InvalidInput if shapes differ or there are no images.
    """
    if reference.shape != reconstruction.shape or reference.ndim != 4 or not len(reference):
        raise InvalidInput(
            f"images of shapes {tuple(reference.shape)} and {tuple(reconstruction.shape)}",
            "one shape (N, H, W, C) with N > 0",
            "compare each image with its own reconstruction",
        )
    pairs = zip(reference.split(_BATCH), reconstruction.split(_BATCH), strict=True)
    return torch.cat([_similarities(x, y) for x, y in pairs])


def _similarities(x: Tensor, y: Tensor) -> Tensor:
    """Return the similarity of each image (N, H, W, C), computed in float64: variances are small differences."""
    count, height, width, channels = x.shape
    x, y = (each.double().permute(0, 3, 1, 2).reshape(count * channels, 1, height, width) for each in (x, y))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).reshape(count, -1).mean(dim=1)


def _blur(images: Tensor) -> Tensor:
    """Return the means (M, 1, H - K + 1, W - K + 1) of images (M, 1, H, W) weighted by the window of side K."""
    for axis in (2, 3):
        weights = _window(images.shape[axis]).to(images.device)
        images = functional.conv2d(images, weights.view(1, 1, *((-1, 1) if axis == 2 else (1, -1))))
    return images


def _window(side: int) -> Tensor:
    """Return one axis of the window, float64 (K,) with sum 1, for images of `side` pixels along it."""
    radius = min(WINDOW // 2, (side - 1) // 2)
    weights = torch.exp(-torch.arange(-radius, radius + 1, dtype=torch.float64).square() / (2 * WINDOW_SIGMA**2))
    return weights / weights.sum()
