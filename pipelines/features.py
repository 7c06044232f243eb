"""Features of many images, by Ray Data: shards of work, each with a record that is written once and kept.

    keys of images     -> read and crop     -> features      (references, held-out images)
    indices of samples -> sample and decode -> features      (a checkpoint)

An actor does all of a shard on its device; no image crosses a process on the way to its features. One pool of
actors does shards of both kinds: starting one costs seconds.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cluster import storage
from evaluation.protocol import EvaluationProtocol
from pipelines.config import EvaluateConfig, ImagesConfig
from pipelines.stage import StageContext

Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """Some images to score: real ones by their keys, or samples by their indices."""

    file: Path
    """Its record; the work is done when it is there."""
    images: Sequence[str] | range

    @property
    def task(self) -> str:
        """The work as text, which Ray Data moves as it is."""
        if isinstance(self.images, range):
            return json.dumps({"file": str(self.file), "samples": [self.images.start, self.images.stop]})
        return json.dumps({"file": str(self.file), "keys": list(self.images)})


def make_shards(folder: Path, parts: Sequence[Sequence[str] | range]) -> list[Shard]:
    """Shards whose records lie in `folder`, numbered."""
    return [Shard(folder / f"shard-{index:05d}.npz", part) for index, part in enumerate(parts)]


def compute_features(
    context: StageContext,
    stage: str,
    shards: list[Shard],
    actor_arguments: tuple,
    workers: EvaluateConfig,
    actor: type | None = None,
) -> None:
    """See to it that every shard has its record: what an earlier run finished is kept, the rest computed now.

    actor: DrawShard for samples alone; left out, ScoreShard.
    """
    pending = [shard for shard in shards if not shard.file.is_file()]
    if not pending:
        return
    left, total = (sum(len(shard.images) for shard in part) for part in (pending, shards))
    progress = context.progress(stage, total=total, unit="images", start=total - left)
    ray_data = context.ray_data(workers, stage)
    rows = [{"index": index, "task": shard.task} for index, shard in enumerate(pending)]
    finished = ray_data.from_items(rows, override_num_blocks=len(rows)).map(
        actor or ScoreShard,
        fn_constructor_args=actor_arguments,
        compute=ray_data.ActorPoolStrategy(size=min(workers.num_workers, len(rows))),
        # Half a CPU: actors that hold every CPU leave none for Ray Data's own tasks, and the job hangs.
        num_cpus=0.5,
        num_gpus=workers.gpus_per_worker,
    )
    for row in finished.iter_rows():
        progress.advance(len(pending[row["index"]].images))


def read_records(shards: list[Shard]) -> Iterator[Record]:
    """Records of computed shards, in order. Raises ValueError for one that does not cover its images."""
    for shard in shards:
        with np.load(shard.file, allow_pickle=False) as file:
            record = dict(file)
        scored = "features" if "features" in record else "images"
        found = len(record.get(scored, ())) + len(record.get("unreadable", ()))
        if found != len(shard.images):
            raise ValueError(
                f"{shard.file}: found {found} images, expected {len(shard.images)}. Delete it and run again"
            )
        yield record


class DrawShard:
    """A shard's task -> its record, written atomically: indices, labels and images of its samples."""

    def __init__(self, config: EvaluateConfig, checkpoint: str | None, protocol: EvaluationProtocol | None):
        import torch

        # The same number of threads on any number of workers: sums in another order differ in the last bits.
        torch.set_num_threads(config.cpus_per_worker)
        self.checkpoint, self.protocol = checkpoint, protocol
        self.batch_size = config.batch_size
        self.device = "cuda" if config.gpus_per_worker else "cpu"

    def __call__(self, row: dict) -> dict:
        task = json.loads(row["task"])
        buffer = io.BytesIO()
        np.savez(buffer, **self._record(task))  # type: ignore[arg-type]
        storage.write_atomically(task["file"], buffer.getvalue())
        return {"index": row["index"]}

    def _record(self, task: dict) -> Record:
        indices = range(*task["samples"])
        labels = self._sampler.labels(indices)
        return {"indices": np.array(indices), "labels": labels, "images": self._sampler.sample(indices, labels)}

    @cached_property
    def _sampler(self):
        from pipelines.sampling import Sampler

        assert self.checkpoint is not None and self.protocol is not None, "samples are of a checkpoint"
        return Sampler(self.checkpoint, self.protocol, batch_size=self.batch_size, device=self.device)


class ScoreShard(DrawShard):
    """The same with features and logits of the images, in order; of real images, too.

    Of those, unreadable ones are named, not dropped.
    """

    def __init__(
        self,
        images: ImagesConfig,
        config: EvaluateConfig,
        checkpoint: str | None = None,
        protocol: EvaluationProtocol | None = None,
    ):
        from evaluation.extractors import create_extractor

        super().__init__(config, checkpoint, protocol)
        self.images = images
        self.extractor = create_extractor(config.extractor, config.extractor_weights, self.device)

    def _record(self, task: dict) -> Record:
        if "keys" in task:
            return self._real(task["keys"])
        samples = super()._record(task)
        return {**samples, **self._extract(samples["images"])}

    def _real(self, keys: list[str]) -> Record:
        from pipelines.preprocess import read_cropped

        images, _, errors = read_cropped(self.images, keys)
        features = self._extract(images) if len(images) else {}
        return {**features, "unreadable": np.array(sorted(errors), dtype=str)}

    def _extract(self, images: np.ndarray) -> Record:
        import torch

        result = self.extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        return {name: value for name, value in result._asdict().items() if value is not None}
