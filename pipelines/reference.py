"""Real images as the extractor sees them: reference statistics, and the features of held-out images.

Those of a recipe are computed once, together, and kept in output/references; `raydit reference build` makes a file.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster import storage
from dit.files import unused
from evaluation.extractors import extractor_name, extractor_sha256, weights_path
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.config import ImagesConfig, Recipe
from pipelines.features import SECONDS, Shard, compute_features, listing_parts, make_shards, read_records
from pipelines.identity import digest_of
from pipelines.images import Listing, open_source
from pipelines.sources.adm import AdmSource
from pipelines.stage import StageContext, located

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
        return self.config.local_folder("references") / f"{self.digest(listing)[:12]}.npz"

    def shards(self, listing: Listing) -> list[Shard]:
        folder = self.path(listing).with_suffix(f".shards-{self.config.evaluate.shard_rows}")
        return make_shards(folder, listing_parts(listing, self.config.evaluate.shard_rows))

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
            reference_statistics(real.config, listing, shards).save(real.path(listing))
        else:
            save_features(read_records(shards), real.path(listing))
        storage.remove_folder(str(shards[0].file.parent))
    held_out = None
    if len(real.held_out) > 1:
        with np.load(real.path(real.held_out), allow_pickle=False) as file:
            held_out = dict(file) if len(file.get("features", ())) > 1 else None
    return with_adm_features(real), held_out


def with_adm_features(real: RealImages) -> ReferenceStatistics:
    """The reference, with the features of the images that an ADM file holds instead of them, where it does."""
    reference = ReferenceStatistics.load(real.config.evaluate.reference or real.path(real.training))
    file = adm_features_file(real.config)
    if reference.features is not None or file is None or not file.is_file():
        return reference
    with np.load(file, allow_pickle=False) as features:
        return replace(reference, features=features["features"])


def extract_adm_images(real: RealImages, context: StageContext) -> None:
    """Extract features of an ADM reference's images (arr_0, for precision, recall and kernel distance), if it has any.

    Like other features of real images they are kept in output/references. The images are taken as they are.
    """
    config, file = real.config, adm_features_file(real.config)
    if file is None or file.is_file():
        return
    given = str(Path(str(config.evaluate.reference)).absolute())
    source = open_source(ImagesConfig(path=given))
    assert isinstance(source, AdmSource), "it ends in .npz"
    images = ImagesConfig(path=given, size=source.shape[1])
    parts = listing_parts(source.listing(), config.evaluate.shard_rows)
    shards = make_shards(file.with_suffix(f".shards-{config.evaluate.shard_rows}"), parts)
    compute_features(context, "reference", shards, (images, config.evaluate), config.evaluate)
    save_features(read_records(shards), file)
    storage.remove_folder(str(shards[0].file.parent))


def adm_features_file(config: Recipe) -> Path | None:
    """Where the features of a given ADM reference's images lie; None for any other reference."""
    given = config.evaluate.reference
    if given is None:
        return None
    with np.load(given, allow_pickle=False) as file:
        if "meta" in file or "arr_0" not in file:
            return None
    identity = digest_of([reference_digest(config), _extractor_weights(config)])
    return config.local_folder("references") / f"{identity[:12]}-images.npz"


def reference_statistics(config: Recipe, listing: Listing, shards: list[Shard]) -> ReferenceStatistics:
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


def _readable(shard: Shard, record: Features) -> list[str]:
    """Keys of the images that a record's features are of, in order."""
    assert isinstance(shard.images, Listing), "references are of real images"
    unreadable = set(record["unreadable"].tolist())
    return [key for key in shard.images.keys if key not in unreadable]


def build_reference(config: Recipe, out: Path, *, context: StageContext) -> ReferenceStatistics:
    """Statistics of all of a recipe's images in a file of their own.

    The recipe's output is the folder of the work (see work_folder): what is finished of it is kept when the command is
    cut off, and all of it removed at the end. Raises FileExistsError if `out` is there.
    """
    out, images = unused(out), RealImages.of(config)
    weights_path(config.evaluate.extractor, config.evaluate.extractor_weights)
    shards = make_shards(Path(config.output).absolute(), listing_parts(images.training, config.evaluate.shard_rows))
    arguments = (located(config.images), config.evaluate)
    compute_features(context, "reference", shards, arguments, config.evaluate)
    reference = reference_statistics(config, images.training, shards)
    reference.save(out)
    storage.remove_folder(config.output)
    return reference


def work_folder(config: Recipe, out: Path) -> str:
    """Where the shards of a reference lie until it is whole: beside it, named after what it is made from."""
    images = RealImages.of(config)
    identity = digest_of([images.digest(images.training), config.evaluate.shard_rows])
    return f"{out.absolute()}.{identity[:12]}.shards"


def save_features(records: Iterator[Features], path: Path) -> None:
    """Keep features and logits as they are."""
    every = [record for record in records if "features" in record]
    names = [name for name in every[0] if name not in ("unreadable", *SECONDS)] if every else []
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.concatenate([record[name] for record in every]) for name in names})  # type: ignore[arg-type]
    storage.write_atomically(str(path), buffer.getvalue())


def _extractor_weights(config: Recipe) -> str:
    return extractor_sha256(config.evaluate.extractor, config.evaluate.extractor_weights)
