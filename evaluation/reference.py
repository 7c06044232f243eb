"""Reference statistics: what real images look like to an extractor, in one .npz file without pickles."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from evaluation.extractors import extractor_sha256
from evaluation.metric_names import INCEPTION

Array = np.ndarray

_MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
_PER_IMAGE = ("features", "keys")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of real features, and where they come from."""

    n: int
    """Images behind mu and sigma; 0: unknown (ADM files do not say)."""
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
    """(M,) text: what their source calls the images behind `features`; None: unknown."""
    extractor: str
    """Name of the extractor."""
    extractor_sha256: str
    """Digest of the extractor's weights."""
    size: int | None = None
    """Side of the images in pixels after preprocessing; None: unknown."""
    crop: str | None = None
    """Rule that cropped and resized them; None: unknown."""
    source: str = ""
    """Where the images came from, for people; not part of the digest."""

    def __post_init__(self) -> None:
        for mean, cov in ((self.mu, self.sigma), (self.mu_s, self.sigma_s)):
            mean_shape, cov_shape = (() if array is None else array.shape for array in (mean, cov))
            if cov_shape != mean_shape * 2:
                raise ValueError(
                    f"Found a mean of shape {mean_shape} with a covariance of {cov_shape}, expected (D,) and "
                    "(D, D). Build the reference again with `raydit reference build`."
                )
        if self.features is not None and self.features.shape[1:] != self.mu.shape:
            raise ValueError(
                f"Found reference features of shape {self.features.shape}, expected (M, {len(self.mu)}). "
                "Extract them with the extractor of mu and sigma."
            )
        if self.keys is not None and (self.features is None or len(self.keys) != len(self.features)):
            found = 0 if self.features is None else len(self.features)
            raise ValueError(
                f"Found {len(self.keys)} keys for {found} reference features, expected one for each. Build the "
                "reference again with `raydit reference build`."
            )

    @property
    def digest(self) -> str:
        """sha256 over content: everything but `source`."""
        digest = hashlib.sha256()
        meta = {key: value for key, value in self._meta().items() if key != "source"}
        digest.update(json.dumps(meta, sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def check_compatible(self, extractor: str, extractor_sha256: str, size: int, crop: str) -> None:
        """Raise ValueError unless images scored like this may be compared with this reference.

        A size or crop that the reference does not know (ADM files) is not compared.
        """
        expected = {"extractor": extractor, "extractor_sha256": extractor_sha256, "size": size, "crop": crop}
        for key, wanted in expected.items():
            found = getattr(self, key)
            if found != wanted and not (found is None and key in ("size", "crop")):
                raise ValueError(
                    f"Found a reference ({self.source or 'source unknown'}) with {key} {found!r}, but the "
                    f"evaluation expects {wanted!r}. Build a matching one with `raydit reference build`, or "
                    f"set {key} to {found!r} in the recipe."
                )

    def save(self, file: BinaryIO) -> None:
        """Write an .npz file: arrays under their field names, the rest as JSON under `meta`."""
        np.savez(file, meta=np.array(json.dumps(self._meta())), **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: BinaryIO, name: str) -> Self:
        """Read a reference written by save, or one of ADM's as it is. name: what messages call the file.

        ADM files (mu, sigma, mu_s, sigma_s of the whole training set, and images under arr_0) carry no meta:
        they stand for the published Inception weights. Their images are left: like any others they are to
        be extracted first.
        """
        with np.load(file, allow_pickle=False) as content:
            if "mu" not in content or "sigma" not in content:
                raise ValueError(
                    f"Found {', '.join(content.files)} in {name}, expected mu and sigma. "
                    "Build a reference with `raydit reference build`."
                )
            arrays: dict[str, Any] = {key: content[key].astype(np.float64) for key in _MOMENTS if key in content}
            if "meta" not in content:
                return cls(
                    n=0,
                    extractor=INCEPTION,
                    extractor_sha256=extractor_sha256(INCEPTION),
                    source=name,
                    **arrays,
                )
            arrays |= {key: content[key] for key in _PER_IMAGE if key in content}
            return cls(**json.loads(str(content["meta"])), **arrays)

    def _meta(self) -> dict[str, Any]:
        return {
            "extractor": self.extractor,
            "extractor_sha256": self.extractor_sha256,
            "n": self.n,
            "size": self.size,
            "crop": self.crop,
            "source": self.source,
        }

    def _arrays(self) -> dict[str, Array]:
        arrays = {name: getattr(self, name) for name in (*_MOMENTS, *_PER_IMAGE)}
        return {name: array for name, array in arrays.items() if array is not None}
