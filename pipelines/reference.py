"""Real images as the extractor sees them: reference statistics, and the features of held-out images.

Both are computed once, together, and kept in output/references.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster import storage
from evaluation.extractors import extractor_name, extractor_sha256
from evaluation.protocol import shard_ranges
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.config import Recipe
from pipelines.features import Shard, make_shards, read_records
from pipelines.identity import digest_of
from pipelines.images import Listing, open_source

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
        """Raises ValueError if there are none, as for an imported checkpoint, and no reference is given instead."""
        if config.images.path:
            training, held_out = open_source(config.images).listing().split(config.images.held_out)
            return cls(config, training, held_out)
        if config.evaluate.reference is None:
            raise ValueError(
                "images.path: found nothing, as the checkpoint is imported; expected images to compare samples with. "
                "Give statistics of some (--reference FILE), or the images (--set images.path=FOLDER)"
            )
        nothing = Listing([], np.empty(0, np.int32), np.empty(0, np.int64), ())
        return cls(config, nothing, nothing)

    def digest(self, listing: Listing) -> str:
        """What the features of a listing depend on; known before they are computed."""
        images, weights = self.config.images, _extractor_weights(self.config)
        return digest_of({"images": listing.digest, "size": images.size, "crop": images.crop, "extractor": weights})

    def path(self, listing: Listing) -> Path:
        return Path(self.config.folder("references")) / f"{self.digest(listing)[:12]}.npz"

    def shards(self, listing: Listing) -> list[Shard]:
        parts = shard_ranges(len(listing), self.config.evaluate.shard_rows)
        folder = self.path(listing).with_suffix(f".shards-{self.config.evaluate.shard_rows}")
        return make_shards(folder, [listing.keys[part.start : part.stop] for part in parts])

    @property
    def wanted(self) -> list[Listing]:
        """Whose features an evaluation needs: the reference's, unless one is given, and the held-out images'."""
        reference = [] if self.config.evaluate.reference else [self.training]
        return [*reference, self.held_out] if len(self.held_out) > 1 else reference

    def missing_shards(self) -> list[Shard]:
        """What is left to compute before `load_real`."""
        missing = (listing for listing in self.wanted if not self.path(listing).is_file())
        return [shard for listing in missing for shard in self.shards(listing)]


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


def load_real(real: RealImages) -> tuple[ReferenceStatistics, Features | None]:
    """The reference (the given file, or the training images' own), and the features and logits of held-out images.

    None in place of the latter where fewer than two are held out and readable. Needs the records of
    `missing_shards`, which it reduces and removes.
    """
    for listing in real.wanted:
        if real.path(listing).is_file():
            continue
        shards = real.shards(listing)
        if listing is real.training:
            reference_statistics(real, read_records(shards)).save(real.path(listing))
        else:
            save_features(read_records(shards), real.path(listing))
        storage.remove_folder(str(shards[0].file.parent))
    held_out = None
    if len(real.held_out) > 1:
        with np.load(real.path(real.held_out), allow_pickle=False) as file:
            held_out = dict(file) if len(file.get("features", ())) > 1 else None
    return ReferenceStatistics.load(real.config.evaluate.reference or real.path(real.training)), held_out


def reference_statistics(real: RealImages, records: Iterator[Features]) -> ReferenceStatistics:
    """Mean and covariance over all records, and the features of evenly spaced images."""
    config, weights = real.config, _extractor_weights(real.config)
    stride = max(1, -(-len(real.training) // MOST_FEATURES))
    statistics: dict[str, FeatureStatistics] = {}
    kept = []
    for record in with_images(records):
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


def with_images(records: Iterator[Features]) -> Iterator[Features]:
    """Records of shards in which at least one image could be read."""
    return (record for record in records if "features" in record)


def save_features(records: Iterator[Features], path: Path) -> None:
    """Keep features and logits as they are."""
    every = list(with_images(records))
    names = [name for name in every[0] if name != "unreadable"] if every else []
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.concatenate([record[name] for record in every]) for name in names})  # type: ignore[arg-type]
    storage.write_atomically(str(path), buffer.getvalue())


def _extractor_weights(config: Recipe) -> str:
    return extractor_sha256(config.evaluate.extractor, config.evaluate.extractor_weights)
