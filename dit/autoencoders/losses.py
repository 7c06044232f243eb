"""Losses of autoencoders beyond the error of pixels: a perceptual distance and an adversarial term.

N images, (N, 3, H, W) in [-1, 1]; L maps of features of a frozen network, of C_l channels and H_l x W_l pixels.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydit.errors import InvalidInput, NotFound
from raydit.packaged_weights import EFFICIENTNETS

EPSILON = 1e-10
"""Added to a feature's norm, as in LPIPS."""
SMALLEST_MAP = 2
"""Side in pixels of the smallest map whose features are compared; deeper layers of small images are left out."""
SMALLEST_IMAGE = 8
"""Side in pixels of the smallest images that a discriminator judges."""
GRADIENT_EPSILON, MAX_ADAPTIVE_WEIGHT = 1e-4, 1e4
"""What keeps the adaptive weight finite: added to the adversarial gradient's norm, and the largest weight."""


PERCEPTUAL_NETWORKS = {name: EFFICIENTNETS[name] for name in ("efficientnet-lite0", "efficientnet-lite2")}
"""Networks in whose features images are compared, by name."""


def find_perceptual_weights(name: str) -> Path:
    """Return the path of a network's weights. Raises NotFound if their package is not installed."""
    network = PERCEPTUAL_NETWORKS[name]
    try:
        return network.path()
    except NotFound as error:
        raise NotFound(
            f"autoencoder.train.perceptual_network: found {name!r}, whose weights are not installed",
            f"the package {network.package}",
            f"{error.do}, or choose another network",
        ) from None


class EfficientNetFeatures(nn.Module):
    """Features of EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946) at the end of each resolution, frozen."""

    def __init__(self, name: str) -> None:
        """Load a network of PERCEPTUAL_NETWORKS. Raises NotFound and InvalidInput for missing and damaged weights."""
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        path = find_perceptual_weights(name)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != PERCEPTUAL_NETWORKS[name].sha256:
            raise InvalidInput(f"{path} is damaged or another version", "the published weights", "install it again")
        network: Any = EfficientNet.from_name(name)
        # weights_only: a file of weights must not be able to run code.
        network.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        self.stem, self.norm, self.blocks = network._conv_stem, network._bn0, network._blocks
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EfficientNetFeatures":
        """Stay in inference: batch norms use the statistics of ImageNet."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return L maps (N, C_l, H_l, W_l), each of half the side of the one before. images: (N, 3, H, W) in [-1, 1].

        Pixels p of [0, 255] are taken as (p - 127) / 128, as in TensorFlow's Lite models, without a resize.
        """
        x = functional.relu6(self.norm(self.stem((images * 127.5 + 0.5) / 128)))
        maps = []
        for block in cast(Sequence[Any], self.blocks):
            if _stride(block) > 1:
                maps.append(x)
                if min(x.shape[-2:]) < 2 * SMALLEST_MAP:
                    return maps
            x = block(x)
        return [*maps, x]


def _stride(block: Any) -> int:
    stride = block._block_args.stride
    return stride if isinstance(stride, int) else max(stride)


class PerceptualDistance:
    """Distance of images in the features of a frozen network, in the form of LPIPS without learned channel weights.

    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1 with weights of 1.
    """

    def __init__(self, features: Callable[[Tensor], list[Tensor]]) -> None:
        """features: maps of images, such as EfficientNetFeatures."""
        self.features = features

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return the mean distance, a scalar: of each position the squared difference of features of length 1.

        images, originals: (N, 3, H, W) in [-1, 1]. It is averaged over positions and images, and summed over layers.
        No gradient is kept for the originals.
        """
        maps = self.features(images)
        with torch.no_grad():
            targets = self.features(originals)
        return torch.stack([feature_distance(one, other) for one, other in zip(maps, targets, strict=True)]).sum()


def feature_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over images and positions of the squared distance of normalised features (N, C, H, W)."""
    return (_normalise(features.float()) - _normalise(targets.float())).square().sum(dim=1).mean()


def _normalise(features: Tensor) -> Tensor:
    # Not the root of a sum that may be 0, whose gradient is not finite.
    return features * (features.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()


class PatchDiscriminator(nn.Module):
    """PatchGAN: judges overlapping patches, of 70 x 70 pixels with three halvings, as real or reconstructed.

    It stacks 4 x 4 convolutions of 64, 128, 256 and 512 channels with leaky ReLU. Group norm replaces the paper's batch
    norm, whose statistics would depend on how many workers share a batch. Source: Isola et al. 2017
    (arXiv 1611.07004), appendix 6.1.2; the same in latent diffusion.
    """

    def __init__(self, image_size: int, width: int = 64) -> None:
        """image_size: side of the images in pixels; small ones are halved less often. width: channels of the first.

        Raises InvalidInput for images of fewer than 8 pixels a side.
        """
        super().__init__()
        if image_size < SMALLEST_IMAGE:
            raise InvalidInput(
                f"autoencoder.train.adversarial_weight: found images of {image_size} pixels a side",
                f"at least {SMALLEST_IMAGE} for a discriminator of patches",
                "remove adversarial_weight, or train on larger images or crops",
            )
        # Two further convolutions without stride take one pixel each.
        halvings = max(count for count in (1, 2, 3) if image_size >> count >= 3)
        channels = [width * 2**power for power in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number, (before, after) in enumerate(zip(channels, channels[1:], strict=False), start=1):
            stride = 2 if number < halvings else 1
            layers.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(min(32, after), after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(channels[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit for each patch, (N, 1, h, w), high for real images."""
        return self.layers(images)


def hinge_loss(real: Tensor, reconstructed: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator's logits, half the sum of mean(max(0, 1 - real)) and of the other's.

    Source: Lim & Ye 2017 (geometric GAN, arXiv 1705.02894).
    """
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + reconstructed).mean())


def adaptive_weight(
    error: Tensor, adversarial: Tensor, last_layer: Tensor, mean_over_workers: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the weight that makes the adversarial term's gradient as long as that of the reconstruction's error.

    error, adversarial: scalars, this worker's means. last_layer: weights of the decoder's last layer, at which the
    gradients are compared. mean_over_workers: the ratio is that of the global batch, whatever the number of workers.
    Source: Rombach et al. 2022, appendix G; Esser et al. 2021 (VQGAN, arXiv 2012.09841), eq. 7.
    """
    gradients = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (error, adversarial)]
    of_error, of_adversarial = mean_over_workers(torch.stack(gradients).float()).flatten(1).norm(dim=1)
    return (of_error / (of_adversarial + GRADIENT_EPSILON)).clamp(max=MAX_ADAPTIVE_WEIGHT)
