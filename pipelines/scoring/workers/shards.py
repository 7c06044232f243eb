"""Shards of images to score: the unit of work of one actor call, and of resuming after an interruption.

Every shard has a record for each extractor: an .npz file that an actor writes once, atomically. A shard whose records
exist is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster import storage
from evaluation.protocol import shard_ranges
from pipelines.config.training import WorkersConfig
from pipelines.images.listing import Listing
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.scoring.workers.actor_pool import run_on_actors

if TYPE_CHECKING:  # actors import this module, and need neither the job's context nor what it imports
    from pipelines.stage import JobContext


@dataclass(frozen=True)
class ScoringShard:
    """A few images to score: real images by their keys, or samples by their indices."""

    file: str
    """Absolute path or URI of the record."""
    images: Listing | range
    source: int = 0
    """Samples and reconstructions: position of their source in the list that the actors hold."""
    held_out: bool = False
    """Real images: whether they are held out, and so read from where images.validation says."""
    reconstruct: bool = False
    """Real images: whether the source's autoencoder encodes and decodes them first."""
    saved: str | None = None
    """Samples: file that exists once their images are saved as well; see SavedSamples.file."""
    extractor: int = 0
    """Position of the record's extractor in the list that the actors hold."""
    further: tuple[tuple[int, str], ...] = ()
    """Positions of further extractors that the same images go through, and the files of their records."""

    @property
    def records(self) -> tuple[tuple[int, str], ...]:
        """The positions of all extractors, and the files of their records."""
        return (self.extractor, self.file), *self.further


def make_shards(
    folder: str,
    parts: Sequence[Listing | range],
    *,
    source: int = 0,
    held_out: bool = False,
    reconstruct: bool = False,
    saved: SavedSamples | None = None,
) -> list[ScoringShard]:
    """Return one shard for each part; their records are numbered files in `folder`, an absolute path or URI."""
    return [
        ScoringShard(
            storage.join(folder, f"shard-{index:05d}.npz"),
            part,
            source,
            held_out,
            reconstruct,
            saved.file(index) if saved else None,
        )
        for index, part in enumerate(parts)
    ]


def share_images(by_extractor: Mapping[int, Sequence[ScoringShard]]) -> list[ScoringShard]:
    """Join shards of the same images, so that these are sampled or read once for all extractors.

    by_extractor: by the extractor's position, equally many shards of each, or none where all records exist.
    """
    columns = {position: shards for position, shards in by_extractor.items() if shards}
    if not columns:
        return []
    first, *others = columns
    return [
        replace(row[0], extractor=first, further=tuple(zip(others, (shard.file for shard in row[1:]), strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


def split_listing(listing: Listing, shard_rows: int) -> list[Listing]:
    """Split a listing into runs of shard_rows consecutive images; the last may be shorter."""
    return [listing.take(part) for part in shard_ranges(len(listing), shard_rows)]


def temporary_shard_dir(file: str, identity: str) -> str:
    """Return the folder next to `file` for the shards that it is made of, named after the digest of its inputs."""
    folder, name = storage.split(storage.absolute(file))
    return storage.join(folder, f"{name}.{identity[:12]}.shards")


def find_unfinished(shards: Sequence[ScoringShard]) -> list[ScoringShard]:
    """Return the shards that lack a record, or the images to be saved. Each folder is listed once."""
    listed: dict[str, dict[str, int]] = {}

    def exists(file: str) -> bool:
        folder, name = storage.split(file)
        if folder not in listed:
            listed[folder] = storage.list_files(folder)
        return name in listed[folder]

    def is_finished(shard: ScoringShard) -> bool:
        recorded = all(exists(file) for _, file in shard.records)
        return recorded and (shard.saved is None or exists(shard.saved))

    return [shard for shard in shards if not is_finished(shard)]


def compute_shards(
    context: "JobContext",
    stage: str,
    shards: Sequence[ScoringShard],
    create_actor: Callable[[], Callable[[ScoringShard], None]],
    workers: WorkersConfig,
) -> None:
    """Compute the records of unfinished shards on a pool of Ray actors, with progress on the terminal.

    create_actor: picklable; called once in each actor's process, it returns what computes a shard, such as
    partial(ScoringActor, images, evaluate, sources).
    """
    unfinished = find_unfinished(shards)
    if not unfinished:
        return
    remaining, total = (sum(len(shard.images) for shard in part) for part in (unfinished, shards))
    progress = context.progress(stage, total=total, unit="images", start=total - remaining)
    context.start_ray(workers, stage)
    files = {file for shard in unfinished for file in (shard.saved, *(file for _, file in shard.records)) if file}
    folders = {storage.split(file)[0] for file in files}
    for shard in run_on_actors(unfinished, create_actor, workers, lambda text: context.say(stage, text), folders):
        progress.advance(len(shard.images))
