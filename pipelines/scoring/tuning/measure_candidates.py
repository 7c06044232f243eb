"""Measuring the candidates of `raydit tune` by Ray tasks: the driver sees a few numbers of each."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from evaluation.halving import Measured
from pipelines.scoring.real_images.references import load_real_features
from pipelines.scoring.tuning.candidates import Candidate, Measurement, RealFeatures, real_images, sample_candidates
from pipelines.scoring.workers.records import load_features
from pipelines.scoring.workers.shards import ScoringShard
from pipelines.stage import JobContext


def measure_records(records: Sequence[Sequence[ScoringShard]], real: Sequence[RealFeatures]) -> Measurement:
    """Measure the samples of one candidate. records, real: of each extractor."""
    features = [load_features(shards).features.features for shards in records]
    ratios = [each.ratio(of_samples) for each, of_samples in zip(real, features, strict=True)]
    known = [ratio for ratio in ratios if ratio is not None]
    mean = float(np.mean(known)) if len(known) == len(ratios) else None
    return Measurement(real[0].measure(features[0]), mean, real[0].recall(features[0]))


class Measurer:
    """Measures candidates by Ray tasks, from their records; real images are loaded once."""

    def __init__(self, context: JobContext, candidates: Sequence[Candidate], folder: str):
        """folder: path or URI of the candidates' records."""
        self._context, self._candidates, self._folder = context, candidates, folder
        self.measurements: dict[tuple[int, int], Measurement] = {}
        """Measurements by candidate position and number of samples."""

    @cached_property
    def _real(self) -> list[RealFeatures]:
        return [RealFeatures.of(*load_real_features(each)) for each in real_images(self._candidates).each_extractor]

    @cached_property
    def _shared(self) -> Any:
        import ray

        return ray.put(self._real)

    def measure(self, chosen: Sequence[int], num_samples: int) -> list[Measured]:
        """Sample what is missing, and return the first extractor's distance of each chosen candidate."""
        import ray

        sample_candidates(self._context, self._candidates, chosen, self._folder, num_samples)
        self._context.start_ray(self._candidates[0].config.evaluate, "tune")  # also where no record was missing
        extractors = range(len(self._real))
        measure = ray.remote(num_cpus=1)(measure_records)
        records = [
            [self._candidates[position].records(self._folder, num_samples, k) for k in extractors]
            for position in chosen
        ]
        tasks = [measure.remote(each, self._shared) for each in records]
        for position, found in zip(chosen, ray.get(tasks), strict=True):
            self.measurements[position, num_samples] = found
        return [self.measurements[position, num_samples].distance for position in chosen]
