"""Reference statistics of a recipe's real images: built once, kept in output/references."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.extractors import extractor_name, extractor_sha256
from evaluation.protocol import shard_ranges
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.config import EvaluateConfig, ImagesConfig, Recipe
from pipelines.features import ScoreImages, compute_features
from pipelines.identity import digest_of
from pipelines.images import Listing, open_source
from pipelines.stage import StageContext

MOST_FEATURES = 10_000
"""Images whose features are kept, for precision, recall and kernel distance: as many as ADM's references have."""


@dataclass(frozen=True)
class RealImages:
    """Real images as an extractor will see them; what it will say of them is known by its digest beforehand."""

    images: ImagesConfig
    evaluate: EvaluateConfig
    listing: Listing

    @property
    def digest(self) -> str:
        """What the features depend on."""
        return digest_of(
            {
                "images": self.listing.digest,
                "size": self.images.size,
                "crop": self.images.crop,
                "extractor": extractor_sha256(self.evaluate.extractor, self.evaluate.extractor_weights),
            }
        )

    def features(self, context: StageContext, stage: str, folder: Path) -> Iterator[dict[str, np.ndarray]]:
        """Records of features, in the order of the listing."""
        keys = self.listing.keys
        shards = [
            {"keys": [keys[i] for i in part], "count": len(part)}
            for part in shard_ranges(len(keys), self.evaluate.shard_rows)
        ]
        return compute_features(
            context, stage, folder, shards, ScoreImages, (self.images, self.evaluate), self.evaluate
        )


def real_images(config: Recipe) -> tuple[RealImages, RealImages]:
    """Training images, which are the reference, and held-out ones, which are the floor."""
    training, held_out = open_source(config.images).listing().split(config.images.held_out)
    return RealImages(config.images, config.evaluate, training), RealImages(config.images, config.evaluate, held_out)


def reference_digest(config: Recipe) -> str:
    """Digest of the reference that an evaluation of `config` uses, before it is built."""
    if config.evaluate.reference is None:
        return real_images(config)[0].digest
    path = Path(config.evaluate.reference)
    if not path.is_file():
        raise FileNotFoundError(
            f"evaluate.reference: nothing at {path}; expected an .npz file of reference statistics. Leave it out to "
            "use the training images, or build one with `raydit reference build`"
        )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_reference(config: Recipe, context: StageContext) -> ReferenceStatistics:
    """The reference of an evaluation: the given file, or the training images' own, built if it is not there."""
    if config.evaluate.reference is not None:
        return ReferenceStatistics.load(config.evaluate.reference)
    training, _ = real_images(config)
    path = config.folder("references") / f"{training.digest[:12]}.npz"
    return build_reference(training, path, context)


def build_reference(real: RealImages, path: Path, context: StageContext) -> ReferenceStatistics:
    """Reference statistics of real images, in `path`; from there if they are there."""
    if path.is_file():
        return ReferenceStatistics.load(path)
    folder = path.with_suffix(".shards")
    statistics: FeatureStatistics | None = None
    kept = []
    stride = max(1, -(-len(real.listing) // MOST_FEATURES))
    for record in real.features(context, "reference", folder):
        features = record["features"]
        statistics = statistics or FeatureStatistics(features.shape[1])
        statistics.update(features)
        kept.append(features[::stride])
    if statistics is None or statistics.n < 2:
        raise ValueError(f"reference: found fewer than 2 usable images in {real.images.path}, expected many more")
    weights = extractor_sha256(real.evaluate.extractor, real.evaluate.extractor_weights)
    reference = ReferenceStatistics(
        n=statistics.n,
        mu=statistics.mean,
        sigma=statistics.cov,
        features=np.concatenate(kept),
        extractor=extractor_name(real.evaluate.extractor, weights),
        extractor_sha256=weights,
        size=real.images.size,
        crop=real.images.crop,
        source=real.images.path,
    )
    reference.save(path)
    from cluster import storage

    storage.remove_folder(str(folder))
    return reference
