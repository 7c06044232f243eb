"""Feature extractors for uint8 images: networks by name, models of timm and transformers, and users' functions."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation.features.extractor_names import ExtractorKind, extractor_kind
from evaluation.features.extractor_table import EXTRACTORS, ExtractorSpec
from evaluation.features.function_extractor import build_function, find_source
from evaluation.protocol import UINT8_RULE
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file
from raydit.zip_checksums import refuse_damaged_zip

if TYPE_CHECKING:
    import torch

    from evaluation.features.networks import Forward, Network, StateDict

Array = np.ndarray

PROBE_SIZE = 64
"""Side of the images that a user's function is checked on, where nobody says what it will get."""
_CPU_BATCH, _DEVICE_BATCH = 4, 256
"""Images in one pass of a network that is not in the table."""


class ExtractorIdentity(NamedTuple):
    """What protocols and references record of an extractor."""

    name: str
    """The extractor's name, as `extractor_name` returns it."""
    sha256: str
    """Digest of its weights; of a function, of its module's source."""
    preprocessing: str | None
    """Preprocessing, for models whose library defines it; None if the name implies it."""


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
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), _full_float32():
            outputs = [self.forward(self._to_device(batch)) for batch in images.split(self.batch_size)]
            # Only now, so that a GPU need not wait for the host between batches.
            features, logits, spatial = (
                None if parts[0] is None else torch.cat([part.float() for part in parts]).cpu().numpy()
                for parts in zip(*outputs, strict=True)
            )
        assert features is not None, "every network returns features"
        return Features(features, logits, spatial)

    def _to_device(self, images: torch.Tensor) -> torch.Tensor:
        """Copy images to the device; to a GPU asynchronously, from pinned memory."""
        if self.device.type == "cuda" and images.device.type == "cpu":
            return images.pin_memory().to(self.device, non_blocking=True)
        return images.to(self.device)


def create_extractor(
    name: str,
    weights: str | Path | None = None,
    device: str = "cpu",
    *,
    image_size: int = PROBE_SIZE,
    sha256: str | None = None,
) -> FeatureExtractor:
    """Build an extractor by its name, of any kind that `evaluation.features.extractor_names` lists.

    weights: path of other weights of the same network; None: the published ones. Those of raydit's own table are
    downloaded once into torch's hub folder unless they are inside a package; of timm and transformers they must be on
    this machine. image_size: side of the images that a user's function is checked on. sha256: the digest that is
    expected, such as that of another machine. Raises InvalidInput if the weights have another digest than published or
    expected, or belong to another network, or a function does not fit; NotFound if there are none.
    """
    import torch

    path, torch_device = fetch_weights(name, weights), torch.device(device)
    identity = identify_extractor(name, weights, read=True)
    if sha256 is not None and identity.sha256 != sha256:
        raise InvalidInput(
            f"{path} has sha256 {identity.sha256} for the extractor {name!r} on {os.uname().nodename}",
            f"{sha256}, as on the machine that planned the work",
            "use the same version of it on all nodes; `raydit submit` sends the working directory",
        )
    kind, (cpu_batch, device_batch) = _kind(name), (_CPU_BATCH, _DEVICE_BATCH)
    if kind == "network":
        spec = EXTRACTORS[name]
        cpu_batch, device_batch = spec.cpu_batch_size, spec.device_batch_size
        network = _build_network(spec, path, identity.sha256, torch_device, published=weights is None)
    elif kind == "timm":
        from evaluation.features.timm_extractor import build_timm

        network = build_timm(name, path, torch_device)
    elif kind == "transformers":
        from evaluation.features.transformers_extractor import build_transformers

        network = build_transformers(name, path, torch_device)
    else:
        with _full_float32():
            network = build_function(name, torch_device, image_size=image_size)
    return FeatureExtractor(
        name=identity.name,
        weights_sha256=identity.sha256,
        feature_dim=network.feature_dim,
        num_logits=network.num_logits,
        device=torch_device,
        batch_size=cpu_batch if torch_device.type == "cpu" else device_batch,
        forward=network.forward,
    )


def identify_extractor(name: str, weights: str | Path | None = None, *, read: bool = False) -> ExtractorIdentity:
    """Return what protocols record of the extractor that create_extractor(name, weights) would build.

    read: whether published weights are read, and not only taken to have the published digest. Raises the same errors as
    create_extractor where something is missing.
    """
    kind = _kind(name)
    if kind == "network" and weights is None and not read:
        return ExtractorIdentity(name, EXTRACTORS[name].sha256, None)
    path = fetch_weights(name, weights)
    preprocessing = None
    if kind == "timm":
        from evaluation.features.timm_extractor import timm_preprocessing

        sha256, preprocessing = _file_sha256(path), str(timm_preprocessing(name))
    elif kind == "transformers":
        from evaluation.features.transformers_extractor import describe_input, weight_files

        sha256, preprocessing = _files_sha256(weight_files(name, path)), describe_input(name, path)
    else:
        sha256 = _file_sha256(path)
    return ExtractorIdentity(extractor_name(name, sha256), sha256, preprocessing)


def extractor_macs(name: str) -> int | None:
    """Return the multiply-accumulates of an extractor for one image, half its FLOPs; None outside of the table."""
    return EXTRACTORS[name].macs if _kind(name) == "network" else None


def extractor_sha256(name: str, weights: str | Path | None = None) -> str:
    """Return the digest of the weights that create_extractor(name, weights) would use, without building it."""
    return identify_extractor(name, weights).sha256


def extractor_name(name: str, sha256: str) -> str:
    """Return the name of an extractor in protocols and metrics.

    Networks of the table: the plain name for the published weights, and NAME-<first 8 digits of their sha256> for any
    others. Folders of transformers: transformers:<last part of the path>-<8 digits>. All others: their own name.
    """
    kind = _kind(name)
    if kind == "network":
        return name if sha256 == EXTRACTORS[name].sha256 else f"{name}-{sha256[:8]}"
    if kind == "transformers":
        from evaluation.features.transformers_extractor import recorded_name

        return recorded_name(name, sha256)
    return name


def fetch_weights(name: str, weights: str | Path | None = None) -> Path:
    """Return the path of an extractor's weights on this machine, and download those of the table if necessary.

    It is a file; of transformers a folder, and of a function its module's source. weights: path of other weights; None:
    the published ones. Raises NotFound and InvalidInput as create_extractor does.
    """
    kind = _kind(name)
    if kind == "function":
        if weights is not None:
            found = f"evaluate.extractor_weights: found {str(weights)!r} for the function {name!r}"
            raise InvalidInput(found, "none, because a function loads its own", "remove it")
        return find_source(name)
    if kind == "transformers":
        from evaluation.features.transformers_extractor import find_folder

        return find_folder(name, weights)
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise NotFound(f"no file at {path}", f"{name} weights", "Correct the path, or leave it out")
        refuse_lfs_pointer_file(path, f"{name} weights")
        return path
    if kind == "timm":
        from evaluation.features.timm_extractor import find_cached_file

        return find_cached_file(name)
    return EXTRACTORS[name].fetch()


def find_cached_weights(name: str) -> Path | None:
    """Return the path of a network's published weights on this machine, or None if it has none."""
    try:
        path = EXTRACTORS[name].published_path
    except NotFound:
        return None
    return path if path.is_file() else None


def _build_network(spec: ExtractorSpec, path: Path, sha256: str, device: torch.device, *, published: bool) -> Network:
    if published and sha256 != spec.sha256:
        raise InvalidInput(
            f"{path} holds {spec.name} weights with sha256 {sha256}",
            spec.sha256,
            "the file is damaged or another version: remove it and fetch it again",
        )
    state_dict = _read_weights(path, trusted=sha256 == spec.sha256)
    try:
        return spec.build(state_dict, device)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise wrong_network(spec.name, path, error) from error


def wrong_network(name: str, path: Path, error: Exception) -> InvalidInput:
    """Return the error about weights that do not belong to a network."""
    details = " ".join(str(error).split())[:200]
    found = f"{path} holds weights of another network ({details}...)"
    return InvalidInput(found, f"those of {name}", "correct the path")


def _read_weights(path: Path, *, trusted: bool) -> StateDict:
    """Read a file of weights; tensors stay on disk until they are used, where the format allows it.

    trusted: whether the file is known by its digest, so that it may be a TorchScript program, as CLIP's are.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if not trusted:
        refuse_damaged_zip(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip and _is_torchscript(path):
        if not trusted:
            found = f"{path} holds a TorchScript program"
            raise InvalidInput(found, "weights alone", "save its state_dict() with torch.save, and use that file")
        with warnings.catch_warnings():  # TorchScript is deprecated, but it is what CLIP's authors publish
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu").state_dict()
    # weights_only: a weight file must not be able to run code.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["constants.pkl"] for name in archive.namelist())


def _files_sha256(files: dict[str, Path]) -> str:
    """Return the digest of one file, or of the names and digests of several."""
    digests = {name: _file_sha256(path) for name, path in sorted(files.items())}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    state = path.stat()
    return _hash_file(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=32)
def _hash_file(path: str, size: int, modified: int) -> str:
    """Return the digest of a file's content, which is read once for each of its states."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Disable TF32, which keeps 10 of float32's 23 bits, in convolutions and matrix products."""
    import torch

    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if matmul != "highest":  # setting even the default changes torch's state: what is compiled is compiled again
        torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _kind(name: str) -> ExtractorKind:
    return "network" if name in EXTRACTORS else extractor_kind(name)


def _check_images(images: torch.Tensor) -> None:
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"Found images of {images.dtype} and shape {tuple(images.shape)}, expected torch.uint8 and "
            f"(N, 3, H, W) with N > 0. Convert images x in [-1, 1] with {UINT8_RULE}."
        )
