"""The networks behind the extractors: each builder turns checked weights into a function of uint8 images.

torch is imported only where a network is built, so that the table of extractors can be read at once.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Forward = Callable[[Tensor], "Outputs"]
    StateDict = dict[str, Any]

_SPATIAL_CHANNELS = 7
"""sFID takes the first 7 channels of 17 x 17 positions: 2023 dimensions, near the 2048 of FID."""


class Outputs(NamedTuple):
    """Tensors that a network returns for a batch of B images."""

    features: Tensor
    """(B, D)."""
    logits: Tensor | None = None
    """(B, K); None if the network has no classes."""
    spatial: Tensor | None = None
    """(B, 2023) for sFID; None if the network has none."""


class Network(NamedTuple):
    """A network on a device, ready to be called."""

    forward: Forward
    """uint8 (B, 3, H, W) on the device -> Outputs."""
    feature_dim: int
    num_logits: int
    """Number of classes; 0: no logits."""


def build_efficientnet_lite(state_dict: StateDict, device: torch.device, *, name: str, pixels: int) -> Network:
    """Build an EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946): 1280 pooled features, 1000 ImageNet logits.

    name: "efficientnet-lite0" to "efficientnet-lite2". Input: bilinear resize to pixels x pixels with half-pixel
    corners (torch's align_corners=False) and antialiasing, which blurs only when shrinking; not rounded back to
    integers; then (x - 127) / 128, as in TensorFlow's Lite models (the package's README gives the normalisation of
    another family).
    """
    import torch
    import torch.nn.functional as F
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(name)
    network.load_state_dict(state_dict)
    _fold_batch_norms(network.eval().requires_grad_(False))
    network.to(device, memory_format=torch.channels_last)

    def forward(images: Tensor) -> Outputs:
        x = F.interpolate(images.float(), size=(pixels, pixels), mode="bilinear", align_corners=False, antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = network.extract_features(x).mean(dim=(2, 3))
        return Outputs(features, network._fc(features))

    return Network(forward, feature_dim=1280, num_logits=1000)


def _fold_batch_norms(network: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, which is 1.6 times as fast on a CPU with channels last.

    Features of about 5 change by 1e-5 at most.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:  # type: ignore[union-attr]
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
    for module, conv, norm in pairs:
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())


def build_inception(state_dict: StateDict, device: torch.device) -> Network:
    """Build the 2015 TensorFlow Inception as ported by torch-fidelity, with its resize to 299 and (x - 128) / 128.

    2048 pooled features for FID (Heusel et al. 2017, arXiv 1706.08500); 1008 logits without bias for the Inception
    Score; for sFID (Nash et al. 2021, arXiv 2103.03841) the first 7 channels of Mixed_6d.branch1x1 after batch norm
    and ReLU, flattened with channels last: 17 x 17 x 7 = 2023.
    """
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Its constructor unpickles any file that it is given, so it gets these checked tensors instead.
    checked = io.BytesIO()
    torch.save(state_dict, checked)
    checked.seek(0)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], checked)
    network.to(device)
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output))

    def forward(images: Tensor) -> Outputs:
        features, logits = network(images)
        return Outputs(features, logits, seen.pop()[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))

    return Network(forward, feature_dim=2048, num_logits=1008)


def build_dinov2(state_dict: StateDict, device: torch.device, *, dim: int, depth: int, num_heads: int) -> Network:
    """Build a DINOv2 (Oquab et al. 2023, arXiv 2304.07193) with torch-fidelity's preprocessing: `dim` features.

    Input: TensorFlow 1's bilinear resize to 224 (corner origin, no antialiasing), then ImageNet's mean and standard
    deviation. The features are those of the class token; there are no logits. Stein et al. 2023 (arXiv 2306.04675)
    found that the Frechet distance of ViT-L agrees best with human judgement.
    """
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    from evaluation.features.dinov2 import DinoV2, DinoV2Config

    with torch.device("meta"):
        network = DinoV2(DinoV2Config(dim=dim, depth=depth, num_heads=num_heads))
    network.load_state_dict(state_dict, assign=True)
    network.eval().requires_grad_(False).to(device)
    mean = 255 * torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = 255 * torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def forward(images: Tensor) -> Outputs:
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(224, 224), align_corners=False)
        return Outputs(network((x - mean) / std))

    return Network(forward, feature_dim=dim, num_logits=0)
