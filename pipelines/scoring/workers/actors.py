"""What Ray actors do with a shard: sample images or read real ones, extract features, write a record per extractor.

    indices of samples    -> sample and decode -> features      (a checkpoint)
    keys of real images   -> read and crop     -> features      (references, held-out images)
    keys of real images   -> encode and decode -> features      (reconstructions, a baseline)

An actor does all of it on its device, so that no image is sent to another process. One pool of actors computes shards
of both kinds: starting an actor takes seconds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dit.hardware.device_errors import worker_device
from evaluation.features.extractor_names import extractor_kind
from evaluation.protocol import EvaluationProtocol
from pipelines.config.evaluate import EvaluateConfig, path_for
from pipelines.config.recipe import ImagesConfig
from pipelines.images.listing import Listing
from pipelines.images.validation import held_out_source
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.scoring.workers.records import MAX_PREVIEW_IMAGES, ShardResult
from pipelines.scoring.workers.shards import ScoringShard
from raydit.compilers import require_compiler

if TYPE_CHECKING:
    from evaluation.extractors import FeatureExtractor
    from pipelines.checkpoints.open import SharedCheckpoint
    from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler


@dataclass(frozen=True)
class SampleSource:
    """What samples are drawn from, and where their images are saved."""

    checkpoint: "SharedCheckpoint"
    protocol: EvaluationProtocol
    saved: SavedSamples | None = None
    guide: "SharedCheckpoint | None" = None
    """The checkpoint for autoguidance; None: there is none."""


class SampleActor:
    """Sample the images of a shard and write them, with indices and labels, into its record."""

    def __init__(self, evaluate: EvaluateConfig, sources: Sequence[SampleSource] = ()):
        import torch

        if sources and evaluate.compile:
            require_compiler(bool(evaluate.gpus_per_worker))
        # The same number of threads for any number of workers: another order of summation changes the last bits.
        torch.set_num_threads(evaluate.cpus_per_worker)
        self.sources, self.batch_size, self.compiled = sources, evaluate.batch_size, evaluate.compile
        self.device = worker_device(evaluate.gpus_per_worker)

    def __call__(self, shard: ScoringShard) -> None:
        """Compute a shard and write its record."""
        self.compute(shard).write(shard.file)

    def compute(self, shard: ScoringShard) -> ShardResult:
        """Compute the record of a shard of samples, and save their images where the source asks for it."""
        source, indices = self.sources[shard.source], shard.images
        assert isinstance(indices, range), "real images need an extractor"
        sampler = self.open_sampler(source)
        labels = sampler.labels(indices)
        started = time.perf_counter()
        images = sampler.sample(indices, labels)
        seconds = np.array(time.perf_counter() - started)
        if source.saved and shard.saved:
            source.saved.write(shard.saved, images, labels, indices)
        flat = images.reshape(len(images), -1, images.shape[-1])
        constant = np.array((flat == flat[:, :1]).all(axis=(1, 2)).sum())
        return ShardResult(
            indices=np.array(indices), labels=labels, images=images, num_constant=constant, sampling_seconds=seconds
        )

    def open_sampler(self, source: SampleSource) -> "CheckpointSampler":
        """Return the source's sampler, loaded once for consecutive shards; only one is in memory at a time."""
        from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler

        if self._opened is None or self._opened[0] != source:
            self._opened = None
            sampler = CheckpointSampler(
                source.checkpoint,
                source.protocol,
                batch_size=self.batch_size,
                device=self.device,
                compiled=self.compiled,
                guide=source.guide,
            )
            self._opened = source, sampler
        return self._opened[1]

    _opened: "tuple[SampleSource, CheckpointSampler] | None" = None


class ScoringActor(SampleActor):
    """Extract features and logits of a shard's images, sampled or real, by one extractor or by several."""

    def __init__(
        self,
        images: ImagesConfig,
        evaluate: EvaluateConfig,
        sources: Sequence[SampleSource] = (),
        digests: Mapping[str, str] | None = None,
    ):
        """digests: of the extractors' weights by name, as where the work was planned; see ScoringSettings."""
        super().__init__(evaluate, sources)
        self.images, self.digests = images, digests or {}
        # Each as a run with it alone creates it.
        self.extractors = [self._create(each) for each in evaluate.for_each_extractor()]

    def _create(self, evaluate: EvaluateConfig) -> "FeatureExtractor":
        from evaluation.extractors import create_extractor

        name, options = evaluate.extractor, dict[str, Any]()
        if extractor_kind(name) == "function":
            options["image_size"] = self.images.size
        if name in self.digests:
            options["sha256"] = self.digests[name]
        return create_extractor(name, path_for(name, evaluate.extractor_weights), self.device, **options)

    def __call__(self, shard: ScoringShard) -> None:
        """Sample or read the images of a shard once, and write the record of each of its extractors.

        A record is that of a run with its extractor alone, but that only the first has what is of the samples: images,
        how many are of a single colour, and the duration of sampling. Unreadable images are named in all.
        """
        is_real = isinstance(shard.images, Listing)
        images, record = self._read(shard) if is_real else self._sample(shard)
        for position, file in shard.records:
            self._with_features(record, images, self.extractors[position]).write(file)
            record = replace(record, images=None, num_constant=None, sampling_seconds=None)

    def _sample(self, shard: ScoringShard) -> tuple[np.ndarray, ShardResult]:
        """Return the samples of a shard, and their record without features."""
        record = self.compute(shard)
        assert record.images is not None and isinstance(shard.images, range), "SampleActor samples images"
        is_shown = shard.images.start < MAX_PREVIEW_IMAGES
        return record.images, record if is_shown else replace(record, images=None)

    def _read(self, shard: ScoringShard) -> tuple[np.ndarray, ShardResult]:
        """Return real images as they are, or as the autoencoder of the source decodes them, with their record."""
        from pipelines.images.preprocess import read_cropped

        listing, through = shard.images, self.sources[shard.source] if shard.reconstruct else None
        assert isinstance(listing, Listing), "samples are not read"

        source = held_out_source(self.images) if shard.held_out else self.images
        images, _, errors = read_cropped(source, listing.keys, listing.locations)
        record = ShardResult(unreadable=np.array(sorted(errors), dtype=str))
        if through is not None and len(images):
            images = self.open_sampler(through).reconstruct(images)
        return images, record

    @staticmethod
    def _with_features(record: ShardResult, images: np.ndarray, extractor: "FeatureExtractor") -> ShardResult:
        import torch

        if not len(images):
            return record
        started = time.perf_counter()
        features = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        seconds = np.array(time.perf_counter() - started)
        return replace(record, **features._asdict(), extraction_seconds=seconds)
