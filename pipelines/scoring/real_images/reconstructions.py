"""Reconstructions of held-out images: a second baseline, the best that samples through an autoencoder can be."""

from dataclasses import dataclass
from functools import cached_property

from cluster import storage
from evaluation.extractors import Features
from pipelines.artifacts import digest_of
from pipelines.images.listing import Listing
from pipelines.scoring.real_images.real_records import RECONSTRUCTIONS
from pipelines.scoring.real_images.references import RealImages, load_features_file, save_features_file
from pipelines.scoring.reports.build_report import spaced_positions
from pipelines.scoring.workers.records import read_results
from pipelines.scoring.workers.shards import ScoringShard, make_shards, split_listing


@dataclass(frozen=True)
class Reconstructions:
    """Held-out images that a checkpoint's autoencoder encodes and decodes, as many as the real baseline has."""

    real: RealImages
    num_samples: int
    """Samples that they are compared with, and the most of them."""
    decoder: str
    """Digest of the autoencoder's weights."""

    @cached_property
    def listing(self) -> Listing:
        """The images; none if they are not wanted, or none are held out."""
        held_out, is_wanted = self.real.held_out, self.real.settings.evaluate.reconstructions is not False
        count = min(len(held_out), self.num_samples) if is_wanted and len(held_out) > 1 else 0
        return held_out.take(spaced_positions(len(held_out), count))

    @property
    def path(self) -> str:
        """Path or URI at which their features are kept."""
        identity = digest_of([self.real.digest(self.listing), self.decoder, *self.listing.column_identity.values()])
        return storage.join(self.real.settings.references, f"{identity[:12]}{RECONSTRUCTIONS}.npz")

    @property
    def _shard_folder(self) -> str:
        return f"{self.path.removesuffix('.npz')}.shards-{self.real.settings.evaluate.shard_rows}"

    def _shards(self) -> list[ScoringShard]:
        parts = split_listing(self.listing, self.real.settings.evaluate.shard_rows)
        return make_shards(self._shard_folder, parts, held_out=True, reconstruct=True)

    def missing_shards(self) -> list[ScoringShard]:
        """Return the shards that must be finished before `load`, by actors whose first source has this autoencoder."""
        return [] if not len(self.listing) or storage.exists(self.path) else self._shards()

    def load(self) -> Features | None:
        """Load their features; None if there are fewer than two. Reduces the records of the shards to one file."""
        if not len(self.listing):
            return None
        if not storage.exists(self.path):
            save_features_file(read_results(self._shards()), self.path)
            storage.remove_folder(self._shard_folder)
        return load_features_file(self.path)
