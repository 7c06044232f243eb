"""Real images as the extractor sees them: reference statistics, and the features of held-out images.

Both are computed once, together, and kept in output/references.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cluster import storage
from evaluation.extractors import extractor_name, extractor_sha256
from evaluation.protocol import shard_ranges
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.config import Recipe
from pipelines.features import ScoreImages, compute_features
from pipelines.identity import digest_of
from pipelines.images import Listing, open_source
from pipelines.stage import StageContext

MOST_FEATURES = 10_000
"""Images whose features are kept, for precision, recall and kernel distance: as many as ADM's references have."""

Features = dict[str, np.ndarray]


@dataclass(frozen=True)
class RealImages:
    """A recipe's images: those it trains on are the reference, the held-out ones give the floor."""

    config: Recipe
    training: Listing
    held_out: Listing

    @classmethod
    def of(cls, config: Recipe) -> "RealImages":
        training, held_out = open_source(config.images).listing().split(config.images.held_out)
        return cls(config, training, held_out)

    def digest(self, listing: Listing) -> str:
        """What the features of a listing depend on; known before they are computed."""
        images, weights = self.config.images, _extractor_weights(self.config)
        return digest_of({"images": listing.digest, "size": images.size, "crop": images.crop, "extractor": weights})

    def path(self, listing: Listing) -> Path:
        return self.config.folder("references") / f"{self.digest(listing)[:12]}.npz"

    def shards(self, listing: Listing) -> list[dict]:
        keys = listing.keys
        parts = shard_ranges(len(keys), self.config.evaluate.shard_rows)
        return [{"keys": [keys[i] for i in part], "count": len(part)} for part in parts]


def reference_digest(config: Recipe) -> str:
    """Digest of the reference that an evaluation of `config` uses, before it is built."""
    if config.evaluate.reference is None:
        real = RealImages.of(config)
        return real.digest(real.training)
    path = Path(config.evaluate.reference)
    if not path.is_file():
        raise FileNotFoundError(
            f"evaluate.reference: nothing at {path}; expected an .npz file of reference statistics. Leave it out to "
            "use the training images"
        )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_real(config: Recipe, context: StageContext) -> tuple[ReferenceStatistics, Features | None]:
    """The reference (the given file, or the training images' own), and the features and logits of held-out images.

    None in place of the latter where a recipe holds out fewer than two. What is not there yet is computed.
    """
    real = RealImages.of(config)
    given = config.evaluate.reference
    wanted = [] if given else [real.training]
    if len(real.held_out) > 1:
        wanted.append(real.held_out)
    missing = [listing for listing in wanted if not real.path(listing).is_file()]
    if missing:
        compute_real(real, missing, context)
    held_out = None
    if real.held_out in wanted:
        with np.load(real.path(real.held_out), allow_pickle=False) as file:
            held_out = dict(file)
    return ReferenceStatistics.load(given or real.path(real.training)), held_out


def compute_real(real: RealImages, listings: list[Listing], context: StageContext) -> None:
    """Compute the features of some listings in one go, and keep what evaluations need of them."""
    config = real.config
    shards = [shard for listing in listings for shard in real.shards(listing)]
    folder = config.folder("references") / f"{digest_of(shards)[:12]}.shards"
    arguments = (config.images, config.evaluate)
    records = compute_features(context, "reference", folder, shards, ScoreImages, arguments, config.evaluate)
    for listing in listings:
        own = islice(records, len(real.shards(listing)))
        if listing is real.training:
            reference_statistics(real, own).save(real.path(listing))
        else:
            save_features(own, real.path(listing))
    storage.remove_folder(str(folder))


def reference_statistics(real: RealImages, records: Iterator[Features]) -> ReferenceStatistics:
    """Mean and covariance over all records, and the features of evenly spaced images."""
    config, weights = real.config, _extractor_weights(real.config)
    stride = max(1, -(-len(real.training) // MOST_FEATURES))
    statistics: dict[str, FeatureStatistics] = {}
    kept = []
    for record in records:
        for name in ("features", "spatial"):
            if name in record:
                statistics.setdefault(name, FeatureStatistics(record[name].shape[1])).update(record[name])
        kept.append(record["features"][::stride])
    features, spatial = statistics.get("features"), statistics.get("spatial")
    if features is None or features.n < 2:
        raise ValueError(f"images.path: found fewer than 2 usable images in {config.images.path}, expected many more")
    return ReferenceStatistics(
        n=features.n,
        mu=features.mean,
        sigma=features.cov,
        mu_s=spatial.mean if spatial else None,
        sigma_s=spatial.cov if spatial else None,
        features=np.concatenate(kept),
        extractor=extractor_name(config.evaluate.extractor, weights),
        extractor_sha256=weights,
        size=config.images.size,
        crop=config.images.crop,
        source=config.images.path,
    )


def save_features(records: Iterator[Features], path: Path) -> None:
    """Keep features and logits as they are."""
    every = list(records)
    names = [name for name in every[0] if name != "unreadable"]
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.concatenate([record[name] for record in every]) for name in names})  # type: ignore[arg-type]
    storage.write_atomically(str(path), buffer.getvalue())


def _extractor_weights(config: Recipe) -> str:
    return extractor_sha256(config.evaluate.extractor, config.evaluate.extractor_weights)
