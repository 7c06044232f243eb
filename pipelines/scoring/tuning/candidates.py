"""The candidates of `raydit tune`: ways to draw samples from a checkpoint, and what is measured of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from cluster import storage
from dit.macs import forward_macs
from evaluation.extractors import Features
from evaluation.halving import Measured
from evaluation.metrics import frechet_distance_of, precision_recall
from evaluation.protocol import EvaluationProtocol, shard_ranges
from evaluation.reference import ReferenceStatistics
from evaluation.statistics import assign_random_parts
from evaluation.uncertainty import BLOCKS
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.config.tune import passes_per_sample
from pipelines.images.open import with_absolute_paths
from pipelines.scoring.real_images.references import RealImages, extract_adm_images
from pipelines.scoring.reports.build_report import fewest_images, spaced_positions
from pipelines.scoring.samples.guide import guide_location
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import SampleSource, ScoringActor
from pipelines.scoring.workers.shards import ScoringShard, compute_shards, make_shards, share_images
from pipelines.stage import JobContext

MAX_RECALL_IMAGES = 2_000
"""Images of each side that recall is computed from; its time grows with their product."""
MIN_RECALL_IMAGES = 10


@dataclass(frozen=True)
class Candidate:
    """One way to draw samples from a checkpoint."""

    opened: LocatedCheckpoint
    config: Recipe
    """The recipe with the candidate's values in [evaluate]."""
    protocol: EvaluationProtocol
    """The search's protocol by the first extractor. Its seed is another one than the recipe's."""
    shard_rows: int
    """Samples in a record, as for all candidates of a search, whose rungs are whole records."""

    @property
    def cost(self) -> float:
        """FLOPs of one sample, but for its decoding and its features."""
        return 2 * passes_per_sample(self.config) * forward_macs(self.opened.record.model_config)

    @cached_property
    def source(self) -> SampleSource:
        """What workers sample from."""
        guide = guide_location(self.protocol, self.config.evaluate, self.opened)
        return SampleSource(self.opened.shared, self.protocol, None, guide)

    def records(self, folder: str, num_samples: int, extractor: int, source: int = 0) -> list[ScoringShard]:
        """Return the shards of the first samples, with records by one extractor; fewer samples are among them.

        extractor: its position. source: position of self.source in the list that the actors get.
        """
        parts = shard_ranges(num_samples, self.shard_rows)
        name = f"{self.protocol.protocol_id}-{self.opened.digest[:12]}-{self.shard_rows}-{extractor}"
        return make_shards(storage.join(folder, name), parts, source=source)


class Measurement(NamedTuple):
    """What is known of a candidate on some of its samples."""

    distance: Measured
    """Frechet distance by the first extractor."""
    ratio: float | None
    """Mean over the extractors of the ratio of the distance to that of held-out images; None for too few images."""
    recall: float | None
    """Recall in the features of the first extractor; None for very few images."""


class RealFeatures(NamedTuple):
    """What one extractor's features of samples are compared with."""

    distance: Callable[[np.ndarray], float]
    """Returns the Frechet distance of features (N, D) from the reference."""
    features: np.ndarray | None
    """(M, D): features of real images, for recall; None if the reference has none."""
    held_out: np.ndarray | None
    """(M, D): features of held-out images; None if there are none."""
    fewest: int
    """Images that a ratio needs."""

    @classmethod
    def of(cls, reference: ReferenceStatistics, held_out: Features | None) -> "RealFeatures":
        """Decompose the reference's covariance, once for all distances."""
        features = reference.features
        if features is not None:
            features = features[spaced_positions(len(features), min(len(features), MAX_RECALL_IMAGES))]
        distance = frechet_distance_of(reference.mu, reference.sigma)
        return cls(distance, features, None if held_out is None else held_out.features, fewest_images(reference)["fd"])

    def ratio(self, features: np.ndarray) -> float | None:
        """Return the distance of samples with features (N, D) over that of held-out images.

        Both are of as many images. None for fewer than reports need for a ratio.
        """
        count = 0 if self.held_out is None else min(len(features), len(self.held_out))
        if self.held_out is None or count < self.fewest:
            return None
        real = self.distance(self.held_out[spaced_positions(len(self.held_out), count)])
        return self.distance(features[:count]) / real if real else None

    def measure(self, features: np.ndarray) -> Measured:
        """Return the distance of samples with features (N, D), and that without each tenth of them."""
        parts = assign_random_parts(len(features), BLOCKS)
        left_out = [self.distance(features[parts != part]) for part in range(BLOCKS)]
        return Measured(self.distance(features), np.array(left_out))

    def recall(self, features: np.ndarray) -> float | None:
        """Return the share of real images that are close to a sample."""
        if self.features is None or min(len(features), len(self.features)) < MIN_RECALL_IMAGES:
            return None
        return precision_recall(features[:MAX_RECALL_IMAGES], self.features)[1]


def sample_candidates(
    context: JobContext, candidates: Sequence[Candidate], chosen: Sequence[int], folder: str, num_samples: int
) -> None:
    """Compute the missing records and features of real images, and the records of the chosen candidates' first samples.

    All candidates have the real images and the workers of the first one.
    """
    config, real = candidates[0].config, real_images(candidates)
    shards = real.missing_shards()
    for position in chosen:
        each = range(len(real.each_extractor))
        records = {k: candidates[position].records(folder, num_samples, k, source=position) for k in each}
        shards += share_images(records)
    sources = [candidate.source for candidate in candidates]
    create_actor = partial(
        ScoringActor,
        with_absolute_paths(config.images),
        config.evaluate,
        sources,
        real.settings.extractor_digests,
    )
    compute_shards(context, "tune", shards, create_actor, config.evaluate)
    extract_adm_images(real, context)  # for recall


def real_images(candidates: Sequence[Candidate]) -> RealImages:
    """Return the real images that all candidates are compared with."""
    return RealImages.of(ScoringSettings.from_recipe(candidates[0].config))
