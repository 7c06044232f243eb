"""Real images as the extractor sees them: reference statistics, and the features of held-out images.

Those of a recipe are computed once, together, and kept in output/references; `raydit reference build` makes a file.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cluster import storage
from evaluation.extractors import extractor_name, extractor_sha256
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.artifacts import digest_of
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.images.listing import Listing
from pipelines.images.open import open_source
from pipelines.images.sources.adm import AdmSource
from pipelines.scoring.actors import (
    SECONDS,
    ScoringShard,
    compute_features,
    listing_parts,
    make_shards,
    read_records,
)
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

    def path(self, listing: Listing) -> str:
        """Path or URI of what is kept of a listing."""
        return reference_place(self.config, f"{self.digest(listing)[:12]}.npz")

    def shard_folder(self, listing: Listing) -> str:
        return reference_place(self.config, f"{self.digest(listing)[:12]}.shards-{self.config.evaluate.shard_rows}")

    def shards(self, listing: Listing) -> list[ScoringShard]:
        return make_shards(self.shard_folder(listing), listing_parts(listing, self.config.evaluate.shard_rows))

    @property
    def wanted(self) -> list[Listing]:
        """Whose features an evaluation needs: the reference's, unless one is given, and the held-out images'."""
        reference = [] if self.config.evaluate.reference else [self.training]
        return [*reference, self.held_out] if len(self.held_out) > 1 else reference

    def missing_shards(self) -> list[ScoringShard]:
        """What is left to compute before `load_real`."""
        missing = (listing for listing in self.wanted if not storage.exists(self.path(listing)))
        return [shard for listing in missing for shard in self.shards(listing)]


def reference_place(config: Recipe, name: str) -> str:
    """Path or URI in output/references."""
    return storage.join(config.folder("references"), name)


def reference_digest(config: Recipe) -> str:
    """Digest of the reference that an evaluation of `config` uses, before it is built."""
    if config.evaluate.reference is None:
        real = RealImages.of(config)
        return real.digest(real.training)
    return storage.sha256_file(given_file(config.evaluate.reference))


def given_file(reference: str) -> str:
    """Local file of the statistics that evaluate.reference names by path or URI."""
    try:
        return storage.fetch_file(reference)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"evaluate.reference: nothing at {reference}; expected an .npz file of reference statistics. Leave it out "
            "to use the training images"
        ) from None


def given_reference(reference: str) -> ReferenceStatistics:
    """The statistics that evaluate.reference names by path or URI."""
    with open(given_file(reference), "rb") as file:
        return ReferenceStatistics.load(file, reference)


def load_real(real: RealImages) -> tuple[ReferenceStatistics, Features | None]:
    """The reference (the given file, or the training images' own), and the features and logits of held-out images.

    None in place of the latter where fewer than two are held out and readable. Needs the records of
    `missing_shards`, which it reduces and removes.
    """
    for listing in real.wanted:
        if storage.exists(real.path(listing)):
            continue
        shards = real.shards(listing)
        if listing is real.training:
            save_reference(reference_statistics(real.config, listing, shards), real.path(listing))
        else:
            save_features(read_records(shards), real.path(listing))
        storage.remove_folder(real.shard_folder(listing))
    held_out = None
    if len(real.held_out) > 1:
        with storage.opened(real.path(real.held_out)) as file, np.load(file, allow_pickle=False) as arrays:
            held_out = dict(arrays) if len(arrays.get("features", ())) > 1 else None
    return with_adm_features(real), held_out


def save_reference(reference: ReferenceStatistics, place: str) -> None:
    buffer = io.BytesIO()
    reference.save(buffer)
    storage.write_atomically(place, buffer.getvalue())


def with_adm_features(real: RealImages) -> ReferenceStatistics:
    """The reference, with the features of the images that an ADM file holds instead of them, where it does."""
    if real.config.evaluate.reference:
        reference = given_reference(real.config.evaluate.reference)
    else:
        with storage.opened(place := real.path(real.training)) as file:
            reference = ReferenceStatistics.load(file, place)
    images = adm_features_file(real.config)
    if reference.features is not None or images is None or not storage.exists(images):
        return reference
    with storage.opened(images) as file, np.load(file, allow_pickle=False) as arrays:
        return replace(reference, features=arrays["features"])


def extract_adm_images(real: RealImages, context: StageContext) -> None:
    """Extract features of an ADM reference's images (arr_0, for precision, recall and kernel distance), if it has any.

    Like other features of real images they are kept in output/references. The images are taken as they are.
    """
    config, file = real.config, adm_features_file(real.config)
    if file is None or storage.exists(file):
        return
    given = storage.absolute(str(config.evaluate.reference))
    source = open_source(ImagesConfig(path=given))
    assert isinstance(source, AdmSource), "it ends in .npz"
    images = ImagesConfig(path=given, size=source.shape[1])
    parts = listing_parts(source.listing(), config.evaluate.shard_rows)
    folder, name = storage.split(file)
    work = storage.join(folder, f"{name.removesuffix('.npz')}.shards-{config.evaluate.shard_rows}")
    shards = make_shards(work, parts)
    compute_features(context, "reference", shards, (images, config.evaluate), config.evaluate)
    save_features(read_records(shards), file)
    storage.remove_folder(work)


def adm_features_file(config: Recipe) -> str | None:
    """Where the features of a given ADM reference's images lie; None for any other reference."""
    given = config.evaluate.reference
    if given is None:
        return None
    with np.load(given_file(given), allow_pickle=False) as file:
        if "meta" in file or "arr_0" not in file:
            return None
    identity = digest_of([reference_digest(config), _extractor_weights(config)])
    return reference_place(config, f"{identity[:12]}-images.npz")


def reference_statistics(config: Recipe, listing: Listing, shards: list[ScoringShard]) -> ReferenceStatistics:
    """Mean and covariance over all records, and the features of evenly spaced images."""
    weights = _extractor_weights(config)
    stride = max(1, -(-len(listing) // MOST_FEATURES))
    statistics: dict[str, FeatureStatistics] = {}
    kept, keys = [], []
    for shard, record in zip(shards, read_records(shards), strict=True):
        if "features" not in record:  # no image of it could be read
            continue
        for name in ("features", "spatial"):
            if name in record:
                statistics.setdefault(name, FeatureStatistics(record[name].shape[1])).update(record[name])
        kept.append(record["features"][::stride])
        keys += _readable(shard, record)[::stride]
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
        keys=np.array(keys),
        extractor=extractor_name(config.evaluate.extractor, weights),
        extractor_sha256=weights,
        size=config.images.size,
        crop=config.images.crop,
        source=config.images.path,
    )


def _readable(shard: ScoringShard, record: Features) -> list[str]:
    """Keys of the images that a record's features are of, in order."""
    assert isinstance(shard.images, Listing), "references are of real images"
    unreadable = set(record["unreadable"].tolist())
    return [key for key in shard.images.keys if key not in unreadable]


def save_features(records: Iterator[Features], place: str) -> None:
    """Keep features and logits as they are."""
    every = [record for record in records if "features" in record]
    names = [name for name in every[0] if name not in ("unreadable", *SECONDS)] if every else []
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.concatenate([record[name] for record in every]) for name in names})  # type: ignore[arg-type]
    storage.write_atomically(place, buffer.getvalue())


def _extractor_weights(config: Recipe) -> str:
    return extractor_sha256(config.evaluate.extractor, config.evaluate.extractor_weights)
