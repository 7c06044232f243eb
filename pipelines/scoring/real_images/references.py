"""Real images as the extractor sees them: reference statistics, and the features of held-out images.

Those of a recipe's images are computed once and kept in output/references; `raydit reference build` makes a file.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from cluster import storage
from evaluation.extractors import Features
from evaluation.features.extractor_names import recipe_name
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import FeatureStatistics
from pipelines.artifacts import digest_of
from pipelines.config.recipe import ImagesConfig
from pipelines.console import say
from pipelines.images.listing import Listing
from pipelines.images.open import open_source
from pipelines.images.sources.adm import AdmSource
from pipelines.scoring.real_images.even_spacing import EvenSpacing
from pipelines.scoring.real_images.real_listing import list_real_images
from pipelines.scoring.real_images.real_records import read_real_results
from pipelines.scoring.reports.build_report import spaced_positions
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.records import ShardResult, read_results
from pipelines.scoring.workers.shards import ScoringShard, compute_shards, make_shards, share_images, split_listing
from pipelines.stage import JobContext
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file

MAX_REFERENCE_FEATURES = 10_000
"""Images whose features a reference keeps, for precision, recall and kernel distance: as many as ADM's references."""
MAX_HELD_OUT_FEATURES = 100_000
"""Held-out images whose features are all kept. Of more, only those that the real baseline is of have features: a
million of Inception's would be 20 GB in memory."""
LEAST_IMAGES = 2
"""Images that a covariance needs."""


@dataclass(frozen=True)
class RealImages:
    """A recipe's images: training images give the reference, held-out ones the real baseline."""

    settings: ScoringSettings
    training: Listing
    held_out: Listing
    num_samples: int | None = None
    """Number of images that are scored; None: evaluate.num_samples."""

    @classmethod
    def of(cls, settings: ScoringSettings, num_samples: int | None = None) -> "RealImages":
        """List the images of a recipe. num_samples: as the field.

        Raises InvalidInput if the recipe has neither images, as that of an imported checkpoint, nor a reference.
        """
        if settings.images.path:
            return cls(settings, *list_real_images(settings), num_samples)
        if any(each.reference is None for each in settings.each_extractor):
            raise InvalidInput(
                "images.path: found nothing (the checkpoint is imported)",
                "images to compare samples with",
                "Give reference statistics (--reference FILE), or images (--set images.path=FOLDER)",
            )
        nothing = Listing([], np.empty(0, np.int32), np.empty(0, np.int64), ())
        return cls(settings, nothing, nothing)

    @cached_property
    def baseline(self) -> Listing:
        """The held-out images that have features: all of them, or of very many those that the real baseline takes."""
        if len(self.held_out) <= MAX_HELD_OUT_FEATURES:
            return self.held_out
        count = min(len(self.held_out), self.num_samples or self.settings.evaluate.num_samples)
        return self.held_out.take(spaced_positions(len(self.held_out), count))

    def digest(self, listing: Listing) -> str:
        """Return the digest of everything that the features of a listing depend on, without computing them."""
        images, (weights, *more) = self.settings.images, self.settings.extractor_identity
        depends = {"images": listing.digest, "size": images.size, "crop": images.crop, "extractor": weights}
        return digest_of({**depends, "own": more} if more else depends)

    def path(self, listing: Listing) -> str:
        """Return the path or URI at which the reference or the features of a listing are kept."""
        return storage.join(self.settings.references, f"{self._name(listing)}.npz")

    def shard_folder(self, listing: Listing) -> str:
        """Return the path or URI of the folder for the shards of a listing."""
        name = f"{self._name(listing)}.shards-{self.settings.evaluate.shard_rows}"
        return storage.join(self.settings.references, name)

    def _name(self, listing: Listing) -> str:
        """Return the part of file names that stands for a listing.

        Held-out images may have the names and lengths, and so the digest, of the training images, and two columns of
        images may have one digest.
        """
        is_alike = listing is not self.training and listing.digest == self.training.digest
        column = f"-{digest_of(listing.image_column)[:8]}" if listing.image_column else ""
        return self.digest(listing)[:12] + column + ("-held-out" if is_alike else "")

    def shards(self, listing: Listing) -> list[ScoringShard]:
        """Return the shards of a listing, finished or not."""
        parts = split_listing(listing, self.settings.evaluate.shard_rows)
        return make_shards(self.shard_folder(listing), parts, held_out=listing is not self.training)

    @property
    def each_extractor(self) -> "list[RealImages]":
        """The same images for each extractor alone, in order."""
        return [replace(self, settings=settings) for settings in self.settings.each_extractor]

    @property
    def missing(self) -> list[Listing]:
        """The listings without the features that an evaluation needs: training images unless a reference is given, and
        those of the baseline."""
        return [listing for listing in (self.training, self.baseline) if self._is_missing(listing)]

    def _is_missing(self, listing: Listing) -> bool:
        is_needed = len(listing) > 1 if listing is not self.training else not self.settings.reference
        return is_needed and not storage.exists(self.path(listing))

    def missing_shards(self) -> list[ScoringShard]:
        """Return the shards that must be finished before load_real_features of each extractor."""
        shards: list[ScoringShard] = []
        for listing in (self.training, self.baseline):
            lacking = {k: each for k, each in enumerate(self.each_extractor) if each._is_missing(listing)}
            shards += share_images({position: each.shards(listing) for position, each in lacking.items()})
        return shards


def reference_digest(settings: ScoringSettings) -> str:
    """Return the digest of the reference that an evaluation by the (first) extractor uses.

    It is known before the reference is built.
    """
    if settings.reference is None:
        real = RealImages.of(settings)
        return real.digest(real.training)
    return given_reference_digest(settings.reference)


def given_reference_digest(reference: str) -> str:
    """Return the digest of a file of reference statistics as protocols have it: the sha256. Raises NotFound."""
    return storage.sha256_file(fetch_reference(reference))


def fetch_reference(reference: str) -> str:
    """Return a local path of the file that evaluate.reference names by path or URI. Raises NotFound."""
    try:
        return storage.fetch_file(reference)
    except FileNotFoundError:
        raise NotFound(
            f"evaluate.reference: nothing at {reference}",
            "an .npz file of reference statistics",
            "Correct the path, or leave it out to use the training images",
        ) from None


def load_given_reference(reference: str) -> ReferenceStatistics:
    """Load the statistics that evaluate.reference names by path or URI. Raises NotFound and InvalidInput."""
    path = fetch_reference(reference)
    refuse_lfs_pointer_file(path, "an .npz file of reference statistics")
    with open(path, "rb") as file:
        return ReferenceStatistics.load(file, reference)


def reference_overrides(reference: str) -> list[str]:
    """Return the overrides by which a recipe scores as given statistics were made: extractor, image size and crop.

    reference: their path or URI. Raises NotFound and InvalidInput.
    """
    statistics = load_given_reference(reference)
    known = [f"evaluate.extractor={recipe_name(statistics.extractor, statistics.extractor_sha256)}"]
    known += [f"images.size={statistics.size}"] if statistics.size else []
    return known + ([f"images.crop={statistics.crop}"] if statistics.crop else [])


def load_real_features(real: RealImages) -> tuple[ReferenceStatistics, Features | None]:
    """Load an extractor's reference, given or of the training images, and its features of the held-out images.

    real: the images for one extractor; see RealImages.each_extractor. The features are None if fewer than two images
    are held out and readable. Reduces the records of real.missing_shards to one file for each listing, and removes
    them. Raises InvalidInput if too many images could not be read (see `read_real_results`).
    """
    computed = real.missing
    for listing in computed:
        shards = real.shards(listing)
        if listing is real.training:
            save_reference(compute_reference(real.settings, listing, shards), real.path(listing))
        else:
            save_features_file(read_real_results(real.settings, shards), real.path(listing))
        storage.remove_folder(real.shard_folder(listing))
    reference = _load_reference(real)
    is_earlier = not real.settings.reference and all(listing is not real.training for listing in computed)
    if is_earlier and reference.n < len(real.training):
        say(
            "reference",
            f"{real.path(real.training)} is of {reference.n:,} of {len(real.training):,} images; if the others were "
            "repaired since, remove it to build it again",
        )
    return reference, _load_held_out(real)


def save_reference(reference: ReferenceStatistics, file: str) -> None:
    """Write a reference to a path or URI, atomically."""
    buffer = io.BytesIO()
    reference.save(buffer)
    storage.write_atomically(file, buffer.getvalue())


def _load_reference(real: RealImages) -> ReferenceStatistics:
    """Load the reference; an ADM file without features gets those of its images, if they were extracted."""
    if real.settings.reference:
        reference = load_given_reference(real.settings.reference)
    else:
        with storage.open_file(path := real.path(real.training)) as file:
            reference = ReferenceStatistics.load(file, path)
    adm_features = _adm_features_file(real.settings)
    if reference.features is not None or adm_features is None or not storage.exists(adm_features):
        return reference
    with storage.open_file(adm_features) as file, np.load(file, allow_pickle=False) as arrays:
        return replace(reference, features=arrays["features"])


def _load_held_out(real: RealImages) -> Features | None:
    return load_features_file(real.path(real.baseline)) if len(real.baseline) > 1 else None


def load_features_file(path: str) -> Features | None:
    """Load what `save_features_file` wrote to a path or URI; None for fewer than two images."""
    with storage.open_file(path) as file, np.load(file, allow_pickle=False) as arrays:
        if len(arrays.get("features", ())) < 2:
            return None
        return Features(**{name: arrays[name] for name in Features._fields if name in arrays})


def extract_adm_images(real: RealImages, context: JobContext) -> None:
    """Extract the features of the images in ADM references (arr_0), where given ones have images.

    They serve precision, recall and kernel distance, and are kept in output/references like other features of real
    images. The images are neither cropped nor resized.
    """
    for settings in real.settings.each_extractor:
        file = _adm_features_file(settings)
        if file is not None and not storage.exists(file):
            _extract_adm_images(settings, file, context)


def _extract_adm_images(settings: ScoringSettings, file: str, context: JobContext) -> None:
    evaluate, reference = settings.evaluate, storage.absolute(str(settings.reference))
    source = open_source(ImagesConfig(path=reference))
    assert isinstance(source, AdmSource), "it ends in .npz"
    images = ImagesConfig(path=reference, size=source.shape[1])
    folder = f"{file.removesuffix('.npz')}.shards-{evaluate.shard_rows}"
    shards = make_shards(folder, split_listing(source.listing(), evaluate.shard_rows))
    create_actor = partial(ScoringActor, images, evaluate, digests=settings.extractor_digests)
    compute_shards(context, "reference", shards, create_actor, evaluate)
    save_features_file(read_results(shards), file)
    storage.remove_folder(folder)


def _adm_features_file(settings: ScoringSettings) -> str | None:
    """Return where the features of the given ADM reference's images are kept; None for any other reference."""
    reference = settings.reference
    if reference is None:
        return None
    with np.load(fetch_reference(reference), allow_pickle=False) as file:
        if "meta" in file or "arr_0" not in file:
            return None
    identity = digest_of([reference_digest(settings), *settings.extractor_identity])
    return storage.join(settings.references, f"{identity[:12]}-images.npz")


def compute_reference(settings: ScoringSettings, listing: Listing, shards: list[ScoringShard]) -> ReferenceStatistics:
    """Reduce the records of a listing's shards to mean, covariance, and features of evenly spaced images.

    shards: of the whole listing, in order. The same images are kept whatever the size of the shards. Raises
    InvalidInput if too many images could not be read (see `read_real_results`), or if there are fewer than two.
    """
    images, spacing = settings.images, EvenSpacing(stride=max(1, -(-len(listing) // MAX_REFERENCE_FEATURES)))
    statistics: dict[str, FeatureStatistics] = {}
    features: list[np.ndarray] = []
    keys: list[str] = []
    for shard, record in zip(shards, read_real_results(settings, shards, LEAST_IMAGES), strict=True):
        assert isinstance(shard.images, Listing), "references are of real images"
        readable = _readable_positions(shard.images, record)
        kept = spacing.choose(readable, len(shard.images))
        if record.features is None:  # none of its images could be read
            continue
        for name, array in (("features", record.features), ("spatial", record.spatial)):
            if array is not None:
                statistics.setdefault(name, FeatureStatistics(array.shape[1])).update(array)
        features.append(record.features[kept])
        keys += [shard.images.keys[position] for position in readable[kept]]
    pooled, spatial = statistics.get("features"), statistics.get("spatial")
    if pooled is None or pooled.n < LEAST_IMAGES:
        raise InvalidInput(
            f"images.path: found fewer than {LEAST_IMAGES} images in {images.path}",
            "many more",
            "Correct the path",
        )
    return ReferenceStatistics(
        n=pooled.n,
        mu=pooled.mean,
        sigma=pooled.cov,
        mu_s=spatial.mean if spatial else None,
        sigma_s=spatial.cov if spatial else None,
        features=np.concatenate(features),
        keys=np.array(keys),
        extractor=settings.extractor.name,
        extractor_sha256=settings.extractor.sha256,
        extractor_preprocessing=settings.extractor.preprocessing,
        size=images.size,
        crop=images.crop,
        source=images.path,
    )


def _readable_positions(images: Listing, record: ShardResult) -> np.ndarray:
    """Return the positions of the images that a shard's features are of, in order. images: all of the shard."""
    assert record.unreadable is not None, "records of real images name those that could not be read"
    unreadable = set(record.unreadable.tolist())
    return np.flatnonzero([key not in unreadable for key in images.keys])


def save_features_file(records: Iterable[ShardResult], file: str) -> None:
    """Write features, logits and spatial features of all records into one file, atomically."""
    parts: dict[str, list[np.ndarray]] = {}
    for record in records:
        for name in Features._fields:
            if record.features is not None and (part := getattr(record, name)) is not None:
                parts.setdefault(name, []).append(part)
    arrays: dict[str, Any] = {}
    for name in list(parts):  # one after the other, because joining takes as much memory again
        arrays[name] = np.concatenate(parts.pop(name))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    del arrays
    storage.write_atomically(file, buffer.getbuffer())
