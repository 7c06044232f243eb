"""Features of many images, by a pool of Ray actors: shards of work, each with a record that is written once and kept.

    keys of images     -> read and crop     -> features      (references, held-out images)
    indices of samples -> sample and decode -> features      (a checkpoint)

An actor does all of a shard on its device; no image crosses a process on the way to its features. One pool of
actors does shards of both kinds: starting one costs seconds.
"""

import io
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cluster import storage
from cluster.read_ahead import opened_in_order
from evaluation.protocol import EvaluationProtocol, shard_ranges
from pipelines.config.recipe import EvaluateConfig, ImagesConfig
from pipelines.images.listing import Listing
from pipelines.scoring.actor_pool import run_on_actors
from pipelines.scoring.records import read_arrays
from pipelines.scoring.saved_samples import KeptImages
from pipelines.stage import StageContext

Record = dict[str, np.ndarray]
SECONDS = ("sampling_seconds", "extraction_seconds")
"""What of a record says how long it took, and nothing of the images."""
MAX_PREVIEW_IMAGES = 1000
"""Samples whose images stay in the records of scored ones, to be looked at; 50,000 of 256 px would take 10 GB."""


@dataclass(frozen=True)
class ScoringShard:
    """Some images to score: real ones by their keys, or samples by their indices."""

    file: str
    """Absolute path or URI of its record; the work is done when that is there."""
    images: Listing | range
    source: int = 0
    """Of samples: which of the actors' sources they are drawn from."""
    kept: str | None = None
    """Where the images are written as well, by the source's KeptImages."""


@dataclass(frozen=True)
class Source:
    """What samples are drawn from."""

    checkpoint: str
    """A path or URI that every worker can open."""
    protocol: EvaluationProtocol
    kept: KeptImages | None = None
    """Where their images are written as well."""


def make_shards(folder: str, parts: Sequence[Listing | range], kept: KeptImages | None = None) -> list[ScoringShard]:
    """Shards whose records lie in `folder`, an absolute path or URI, numbered."""
    return [
        ScoringShard(storage.join(folder, f"shard-{index:05d}.npz"), part, kept=kept.file(index) if kept else None)
        for index, part in enumerate(parts)
    ]


def temporary_shard_dir(file: str, identity: str) -> str:
    """Folder for the shards of a file until it is whole, named after what it is made from."""
    folder, name = storage.split(storage.absolute(file))
    return storage.join(folder, f"{name}.{identity[:12]}.shards")


def listing_parts(listing: Listing, shard_rows: int) -> list[Listing]:
    """Consecutive images of a listing, shard_rows at a time."""
    return [listing.take(part) for part in shard_ranges(len(listing), shard_rows)]


def compute_features(
    context: StageContext,
    stage: str,
    shards: list[ScoringShard],
    actor_arguments: tuple,
    workers: EvaluateConfig,
    actor: type | None = None,
) -> None:
    """See to it that every shard has its record: what an earlier run finished is kept, the rest computed now.

    actor: SampleActor for samples alone; left out, ScoringActor.
    """
    pending = unfinished(shards)
    if not pending:
        return
    left, total = (sum(len(shard.images) for shard in part) for part in (pending, shards))
    progress = context.progress(stage, total=total, unit="images", start=total - left)
    context.start_ray(workers, stage)
    done = run_on_actors(
        pending, actor or ScoringActor, actor_arguments, workers, lambda text: context.say(stage, text)
    )
    for shard in done:
        progress.advance(len(shard.images))


def unfinished(shards: Sequence[ScoringShard]) -> list[ScoringShard]:
    """Shards without their record, or without the images that are to be kept. Every folder is listed once."""
    listed: dict[str, dict[str, int]] = {}

    def is_there(place: str) -> bool:
        folder, name = storage.split(place)
        if folder not in listed:
            listed[folder] = storage.list_files(folder)
        return name in listed[folder]

    return [shard for shard in shards if not is_there(shard.file) or (shard.kept and not is_there(shard.kept))]


def read_records(shards: Sequence[ScoringShard], without: Collection[str] = ()) -> Iterator[Record]:
    """Records of computed shards, in order, without some of their arrays.

    Raises ValueError for one that does not cover its images.
    """
    files = opened_in_order([shard.file for shard in shards])
    for shard, file in zip(shards, files, strict=True):
        with file:
            record = read_arrays(file, without)
        scored = "features" if "features" in record else "images"
        found = len(record.get(scored, ())) + len(record.get("unreadable", ()))
        if found != len(shard.images):
            raise ValueError(
                f"{shard.file}: found {found} images, expected {len(shard.images)}. Delete it and run again"
            )
        yield record


def load_features(shards: Sequence[ScoringShard]) -> tuple[Record, dict[str, float]]:
    """Features, logits, labels and so on of all images of computed shards, in order; images are left where they are.

    Also how long workers have sampled and extracted, all of them together. Raises ValueError if a record is not of its
    shard's very samples, or an image could not be read: a score is of a known number of images.
    """
    total, start = sum(len(shard.images) for shard in shards), 0
    whole: Record = {}
    seconds: dict[str, float] = {}
    for shard, record in zip(shards, read_records(shards, without=("images",)), strict=True):
        for name in SECONDS:
            if name in record:
                seconds[name] = seconds.get(name, 0.0) + float(record.pop(name))
        if isinstance(shard.images, range) and not np.array_equal(record["indices"], shard.images):
            raise ValueError(
                f"{shard.file}: found samples {_ends(record['indices'])}, expected {_ends(shard.images)}. Delete it "
                "and run again"
            )
        if len(unreadable := record.pop("unreadable", np.array([]))):
            raise ValueError(
                f"{len(unreadable)} images cannot be read, such as {unreadable[0]}; expected every image to be "
                "scored. Take them away, or replace them"
            )
        for name, part in record.items():
            # Filled in place: parts joined at the end would be in memory twice.
            whole.setdefault(name, np.empty((total, *part.shape[1:]), part.dtype))[start : start + len(part)] = part
        start += len(shard.images)
    return whole, {f"workers_{name}": round(spent, 3) for name, spent in seconds.items()}


def _ends(indices: Sequence[int] | np.ndarray) -> str:
    return f"{indices[0]} to {indices[-1]}"


def load_preview_images(shards: Sequence[ScoringShard]) -> np.ndarray:
    """Images of the first samples, uint8 (N, H, W, 3)."""
    first = [shard for shard in shards if isinstance(shard.images, range) and shard.images.start < MAX_PREVIEW_IMAGES]
    return np.concatenate([record["images"] for record in read_records(first)])


class SampleActor:
    """A shard -> its record, written atomically: indices, labels and images of its samples."""

    def __init__(self, config: EvaluateConfig, sources: Sequence[Source] = ()):
        import torch

        # The same number of threads on any number of workers: sums in another order differ in the last bits.
        torch.set_num_threads(config.cpus_per_worker)
        self.sources, self.batch_size, self.compiled = sources, config.batch_size, config.compile
        self.device = "cuda" if config.gpus_per_worker else "cpu"

    def __call__(self, shard: ScoringShard) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **self._record(shard))  # type: ignore[arg-type]
        storage.write_atomically(shard.file, buffer.getvalue())

    def _record(self, shard: ScoringShard) -> Record:
        source, indices = self.sources[shard.source], shard.images
        assert isinstance(indices, range), "real images need an extractor"
        sampler = self._sampler(source)
        labels = sampler.labels(indices)
        started = time.perf_counter()
        images = sampler.sample(indices, labels)
        seconds = time.perf_counter() - started
        if source.kept and shard.kept:
            source.kept.write(shard.kept, images, labels, indices)
        return {"indices": np.array(indices), "labels": labels, "images": images, SECONDS[0]: np.array(seconds)}

    def _sampler(self, source: Source):
        """The checkpoint is read once for shards that follow each other; no two are in memory."""
        from pipelines.scoring.checkpoint_sampler import Sampler

        if self._opened is None or self._opened[0] != source:
            self._opened = None
            sampler = Sampler(
                source.checkpoint,
                source.protocol,
                batch_size=self.batch_size,
                device=self.device,
                compiled=self.compiled,
            )
            self._opened = (source, sampler)
        return self._opened[1]

    _opened: tuple | None = None


class ScoringActor(SampleActor):
    """The same with features and logits of the images, in order; of real images, too.

    Of those, unreadable ones are named, not dropped.
    """

    def __init__(self, images: ImagesConfig, config: EvaluateConfig, sources: Sequence[Source] = ()):
        from evaluation.extractors import create_extractor

        super().__init__(config, sources)
        self.images = images
        self.extractor = create_extractor(config.extractor, config.extractor_weights, self.device)

    def _record(self, shard: ScoringShard) -> Record:
        if isinstance(shard.images, Listing):
            return self._real(shard.images)
        record = super()._record(shard)
        record |= self._extract(record["images"])
        if shard.images.start >= MAX_PREVIEW_IMAGES:
            del record["images"]
        return record

    def _real(self, listing: Listing) -> Record:
        from pipelines.images.preprocess import read_cropped

        places = None if listing.places is None else listing.places.tolist()
        images, _, errors = read_cropped(self.images, listing.keys, places)
        features = self._extract(images) if len(images) else {}
        return {**features, "unreadable": np.array(sorted(errors), dtype=str)}

    def _extract(self, images: np.ndarray) -> Record:
        import torch

        started = time.perf_counter()
        result = self.extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        found = {name: value for name, value in result._asdict().items() if value is not None}
        return {**found, SECONDS[1]: np.array(time.perf_counter() - started)}
