"""The networks that extract features under names of their own, with their published weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.features.clip import build_clip, clip_macs
from evaluation.features.extractor_names import CLIP_L_336, INCEPTION
from evaluation.features.networks import build_dinov2, build_efficientnet_lite, build_inception
from raydit.errors import NotFound
from raydit.packaged_weights import EFFICIENTNETS

if TYPE_CHECKING:
    import torch

    from evaluation.features.networks import Network, StateDict

EFFICIENTNET_LITE0 = "efficientnet-lite0"


@dataclass(frozen=True, kw_only=True)
class ExtractorSpec:
    """An extractor that can be built by name: its published weights, its network and what that costs."""

    name: str
    sha256: str
    """Digest of the published weights, which `name` stands for."""
    url: str = ""
    """Address of the published weights; empty: they are inside a Python package."""
    file: str = ""
    """Name of the downloaded file; empty: the last part of `url`."""
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

    @property
    def published_path(self) -> Path:
        """Path of the published weights on this machine, whether they are there or would have to be downloaded.

        Raises NotFound if they are inside a package that is not installed.
        """
        import torch

        if self.packaged_weights is not None:
            return self.packaged_weights()
        return Path(torch.hub.get_dir()) / "checkpoints" / (self.file or self.url.rsplit("/", 1)[1])

    def fetch(self) -> Path:
        """Return the path of the published weights, and download them if necessary. Raises NotFound."""
        path = self.published_path
        if not path.is_file():
            self._download(path)
        return path

    def _download(self, path: Path) -> None:
        import torch

        assert self.url, f"the weights of {self.name} are inside a package"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(self.url, str(path), self.sha256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another sha256
            raise NotFound(
                f"no {self.name} weights at {path}, and they could not be downloaded ({error})",
                "the published weights",
                f"Fetch {self.url} on a machine with network and copy it there, or set evaluate.extractor_weights to "
                f'its path, or set evaluate.extractor = "{EFFICIENTNET_LITE0}"',
            ) from error


def _efficientnet(size: int, *, pixels: int, macs: int, cpu_batch_size: int) -> ExtractorSpec:
    name = f"efficientnet-lite{size}"
    return ExtractorSpec(
        name=name,
        sha256=EFFICIENTNETS[name].sha256,
        packaged_weights=EFFICIENTNETS[name].path,
        build=partial(build_efficientnet_lite, name=name, pixels=pixels),
        cpu_batch_size=cpu_batch_size,
        macs=macs,
    )


def _dinov2(size: str, sha256: str, *, macs: int, dim: int, depth: int, num_heads: int) -> ExtractorSpec:
    name = f"dinov2_vit{size}14"
    return ExtractorSpec(
        name=f"dinov2-vit-{size}-14",
        sha256=sha256,
        url=f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth",
        build=partial(build_dinov2, dim=dim, depth=depth, num_heads=num_heads),
        macs=macs,
    )


def _clip(name: str, file: str, sha256: str, **sizes: Any) -> ExtractorSpec:
    return ExtractorSpec(
        name=name,
        sha256=sha256,
        url=f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt",
        file=f"{name}-{sha256}.pt",  # as torch-fidelity names it, which may have downloaded it
        build=partial(build_clip, **sizes),
        macs=clip_macs(**sizes),
    )


_DINOV2_S = "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
_DINOV2_B = "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
_DINOV2_L = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
_CLIP_B = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_CLIP_336 = "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"

EXTRACTORS = {
    spec.name: spec
    for spec in (
        _efficientnet(0, pixels=224, macs=385_187_552, cpu_batch_size=4),  # the fastest of 4, 8, 16 and 32
        ExtractorSpec(
            name=INCEPTION,
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            build=build_inception,
            cpu_batch_size=16,  # the fastest of 4, 8, 16 and 32
            macs=5_713_232_480,
        ),
        _dinov2("s", _DINOV2_S, macs=6_123_561_984, dim=384, depth=12, num_heads=6),
        _dinov2("b", _DINOV2_B, macs=23_161_227_264, dim=768, depth=12, num_heads=12),
        _dinov2("l", _DINOV2_L, macs=81_011_982_336, dim=1024, depth=24, num_heads=16),
        _efficientnet(1, pixels=240, macs=600_185_232, cpu_batch_size=4),
        _efficientnet(2, pixels=260, macs=859_736_272, cpu_batch_size=4),
        _clip("clip-vit-b-32", "ViT-B-32", _CLIP_B, size=224, patch=32, width=768, depth=12, dim=512),
        _clip("clip-vit-l-14", "ViT-L-14", _CLIP_L, size=224, patch=14, width=1024, depth=24, dim=768),
        _clip(CLIP_L_336, "ViT-L-14-336px", _CLIP_336, size=336, patch=14, width=1024, depth=24, dim=768),
    )
}
"""The networks by name. To add an extractor, add an entry here and one in `extractor_names.NETWORKS`."""
