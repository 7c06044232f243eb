"""Reference statistics: an extractor's features of real images, summarised in one .npz file without pickles."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from evaluation.extractors import extractor_sha256
from evaluation.features.extractor_names import INCEPTION
from evaluation.npz import ArrayHeader, check_npz
from raydit.errors import InvalidInput

Array = np.ndarray

_MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
_PER_IMAGE = ("features", "keys")
ADM_DIMENSIONS = {"mu": 2048, "mu_s": 2023}
"""Features and spatial features of the published Inception weights, which files without meta are of."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of the features of real images, and the images' origin."""

    n: int
    """Number of images behind mu and sigma; 0: unknown (ADM files do not say)."""
    mu: Array
    """(D,) float64."""
    sigma: Array
    """(D, D) float64, ddof 1."""
    mu_s: Array | None = None
    """(2023,) float64: mean of the spatial features of sFID."""
    sigma_s: Array | None = None
    """(2023, 2023) float64."""
    features: Array | None = None
    """(M, D) float32 features of some or all images, for precision, recall and kernel distance."""
    keys: Array | None = None
    """(M,) text: keys of the images behind `features` in their source; None: unknown."""
    extractor: str
    """Name of the extractor."""
    extractor_sha256: str
    """Digest of the extractor's weights."""
    size: int | None = None
    """Side of the preprocessed images in pixels; None: unknown."""
    crop: str | None = None
    """Rule by which the images were cropped and resized; None: unknown."""
    source: str = ""
    """Origin of the images, for people to read; not part of the digest."""
    extractor_preprocessing: str | None = None
    """What the extractor did to images first, as protocols have it."""

    def __post_init__(self) -> None:
        for mean, cov in ((self.mu, self.sigma), (self.mu_s, self.sigma_s)):
            mean_shape, cov_shape = (() if array is None else array.shape for array in (mean, cov))
            if cov_shape != mean_shape * 2:
                raise InvalidInput(
                    f"reference with a mean of shape {mean_shape} and a covariance of {cov_shape}",
                    "(D,) and (D, D)",
                    "build the reference again with `raydit reference build`",
                )
        if self.features is not None and self.features.shape[1:] != self.mu.shape:
            raise InvalidInput(
                f"reference features of shape {self.features.shape}",
                f"(M, {len(self.mu)})",
                "extract them with the extractor of mu and sigma",
            )
        if self.keys is not None and (self.features is None or len(self.keys) != len(self.features)):
            found = 0 if self.features is None else len(self.features)
            raise InvalidInput(
                f"reference with {len(self.keys)} keys for {found} features",
                "one key for each",
                "build the reference again with `raydit reference build`",
            )

    @property
    def digest(self) -> str:
        """sha256 of everything but `source`."""
        digest = hashlib.sha256()
        meta = {key: value for key, value in self._meta().items() if key != "source"}
        digest.update(json.dumps(meta, sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def check_compatible(
        self, extractor: str, extractor_sha256: str, size: int, crop: str, preprocessing: str | None = None
    ) -> None:
        """Raise InvalidInput unless features of this extractor, size and crop can be compared with this reference.

        preprocessing: the extractor's. A size or crop that the reference does not know (ADM files) is not checked.
        Nothing but their number tells whether the features of such a file are Inception's.
        """
        expected = {
            "extractor": extractor,
            "extractor_sha256": extractor_sha256,
            "extractor_preprocessing": preprocessing,
            "size": size,
            "crop": crop,
        }
        for key, wanted in expected.items():
            found = getattr(self, key)
            if found != wanted and not (found is None and key in ("size", "crop")):
                raise InvalidInput(
                    f"reference ({self.source or 'source unknown'}) with {key} {found!r}",
                    f"{wanted!r} as in the evaluation",
                    _what_to_do(key, found),
                )

        if self.n == 0:
            self._require_adm_dimensions()

    def _require_adm_dimensions(self) -> None:
        for key, dim in ADM_DIMENSIONS.items():
            mean = getattr(self, key)
            if mean is not None and mean.shape != (dim,):
                raise InvalidInput(
                    f"{self.source}: found {key} of shape {mean.shape} and no meta that names an extractor",
                    f"({dim},), the features of the published Inception weights",
                    "build a reference with `raydit reference build`, which records its extractor",
                )

    def save(self, file: BinaryIO) -> None:
        """Write an .npz file with the arrays under their field names and the other fields as JSON under `meta`."""
        np.savez(file, meta=np.array(json.dumps(self._meta())), **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: BinaryIO, name: str) -> Self:
        """Read a reference that save wrote, or an original one of ADM. name: the file's name in messages.

        ADM files (mu, sigma, mu_s, sigma_s of all training images, and some images under arr_0) have no meta, and are
        taken as statistics of the published Inception weights. Their images are not read; extract their features like
        those of any other images. Raises InvalidInput for a file without mu and sigma, and for one that cannot be read
        or holds anything but finite numbers.
        """
        headers = check_npz(file, name)
        with np.load(file, allow_pickle=False) as content:
            if "mu" not in content or "sigma" not in content:
                raise InvalidInput(
                    f"{name} holds {', '.join(content.files)}",
                    "mu and sigma",
                    "build a reference with `raydit reference build`",
                )
            arrays: dict[str, Any] = {
                key: _require_finite(content[key], f"{name}: {key}").astype(np.float64)
                for key in _MOMENTS
                if key in content
            }
            if "meta" not in content:
                return cls(
                    n=0,
                    extractor=INCEPTION,
                    extractor_sha256=extractor_sha256(INCEPTION),
                    size=_image_side(headers),
                    source=name,
                    **arrays,
                )
            arrays |= {key: content[key] for key in _PER_IMAGE if key in content}
            if "features" in arrays:
                _require_finite(arrays["features"], f"{name}: features")
            return cls(**_parse_meta(str(content["meta"]), name), **arrays)

    def _meta(self) -> dict[str, Any]:
        preprocessing = self.extractor_preprocessing
        return {
            "extractor": self.extractor,
            "extractor_sha256": self.extractor_sha256,
            "n": self.n,
            "size": self.size,
            "crop": self.crop,
            "source": self.source,
            **({} if preprocessing is None else {"extractor_preprocessing": preprocessing}),
        }

    def _arrays(self) -> dict[str, Array]:
        arrays = {name: getattr(self, name) for name in (*_MOMENTS, *_PER_IMAGE)}
        return {name: array for name, array in arrays.items() if array is not None}


def _require_finite(array: Array, where: str) -> Array:
    """Return an array of finite real numbers. Raises InvalidInput for any other; where: its name in messages."""
    is_number = array.dtype.kind in "fiu"
    if not is_number or not np.isfinite(array).all():
        found = "NaN or infinity" if is_number else f"an array of {array.dtype}"
        raise InvalidInput(
            f"{where}: found {found}", "finite numbers", "build the reference again, from features that are finite"
        )
    return array


def _image_side(headers: dict[str, ArrayHeader]) -> int | None:
    """Return the side in pixels of the square images that an ADM file holds; None if it holds none."""
    shape = headers["arr_0"].shape if "arr_0" in headers else ()
    return shape[1] if len(shape) == 4 and shape[1] == shape[2] else None


def _what_to_do(key: str, found: object) -> str:
    """Return what to do about a reference that differs from the evaluation in one field."""
    build = "build a matching one with `raydit reference build`"
    if key == "extractor":
        return f"{build}, or score by that extractor"
    if key in ("size", "crop"):
        return f"{build}, or set images.{key} to {found!r} in the recipe"
    return f"{build}, or score with the weights that it was made with (evaluate.extractor_weights)"


def _parse_meta(text: str, name: str) -> dict[str, Any]:
    """Return the fields that are no arrays. Raises InvalidInput for anything else."""
    text_fields = ("extractor", "extractor_sha256", "extractor_preprocessing", "source")
    kinds = {"n": int, "size": int | None, "crop": str | None, **dict.fromkeys(text_fields, str)}
    try:
        meta = json.loads(text)
        if meta.keys() <= kinds.keys() and all(isinstance(value, kinds[key]) for key, value in meta.items()):
            return meta
    except (ValueError, AttributeError, RecursionError):
        pass
    raise InvalidInput(
        f"{name}: found {text[:200]!r} as meta",
        f"JSON with {', '.join(kinds)}",
        "build a reference with `raydit reference build`",
    )
