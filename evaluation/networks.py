"""The networks behind the extractors: checked weights and a device -> a function of uint8 images."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[Tensor], dict[str, Tensor]]
Network = tuple[Forward, int, int]
"""The function, the number of its features and of its logits."""

_SPATIAL_CHANNELS = 7
"""sFID takes the first 7 channels of 17 x 17 positions: 2023 dimensions, near the 2048 of FID."""


def build_efficientnet_lite0(state_dict: dict[str, Any], device: torch.device) -> Network:
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946): 1280 pooled features, 1000 ImageNet logits.

    Input: bilinear resize to 224 x 224 with half-pixel corners (torch's align_corners=False) and antialias,
    which blurs only when shrinking; not rounded back; then (x - 127) / 128, as in TensorFlow's Lite models
    (the package's README names the normalisation of another family).
    """
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state_dict)
    _fold_batch_norms(network.eval().requires_grad_(False))
    network.to(device, memory_format=torch.channels_last)

    def forward(images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = network.extract_features(x).mean(dim=(2, 3))
        return {"features": features, "logits": network._fc(features)}

    return forward, 1280, 1000


def _fold_batch_norms(network: nn.Module) -> None:
    """Put every batch norm into the convolution before it; with channels last 1.6 times faster on a CPU.

    Features move by 1e-5 at most, in about 5.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:  # type: ignore[union-attr]
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
    for module, conv, norm in pairs:
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())


def build_inception(state_dict: dict[str, Any], device: torch.device) -> Network:
    """The 2015 TensorFlow Inception as ported by torch-fidelity: its resize to 299, its (x - 128) / 128.

    2048 pooled features for FID (Heusel et al. 2017); 1008 logits without bias for IS; for sFID (Nash et al.
    2021, arXiv 2103.03841) the first 7 channels of Mixed_6d.branch1x1 after batch norm and ReLU, flattened
    channels last: 17 x 17 x 7 = 2023.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Its constructor unpickles any file it is given, so it is given these checked tensors instead.
    checked = io.BytesIO()
    torch.save(state_dict, checked)
    checked.seek(0)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], checked)
    network.to(device)
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output))

    def forward(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(images)
        spatial = seen.pop()[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"features": features, "logits": logits, "spatial": spatial}

    return forward, 2048, 1008


def build_dinov2(name: str, state_dict: dict[str, Any], device: torch.device) -> Network:
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193) fed as torch-fidelity feeds it: 384, 768 or 1024 features.

    Its TF1 bilinear resize to 224 (corner origin, no antialias), then ImageNet's mean and deviation. Features are
    the class token's; there are no logits. Stein et al. 2023 (arXiv 2306.04675) found the Frechet distance of
    ViT-L's nearest to people's judgement.
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    from evaluation.dinov2 import CONFIGS, DinoV2

    network = DinoV2(CONFIGS[name])
    network.load_state_dict(state_dict)
    network.eval().requires_grad_(False).to(device)
    mean = 255 * torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    deviation = 255 * torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def forward(images: Tensor) -> dict[str, Tensor]:
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(224, 224), align_corners=False)
        return {"features": network((x - mean) / deviation)}

    return forward, CONFIGS[name].dim, 0
