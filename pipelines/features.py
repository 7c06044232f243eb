"""Features of many images, by Ray Data: shards of work, each with a record that is written once and kept.

    keys of images  -> read and crop -> features      (references, held-out images)
    indices of samples -> sample and decode -> features      (a checkpoint)

An actor does all of a shard on its device; no image crosses a process on the way to its features.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cluster import storage
from evaluation.protocol import EvaluationProtocol
from pipelines.config import EvaluateConfig, ImagesConfig
from pipelines.stage import StageContext


def compute_features(
    context: StageContext,
    stage: str,
    folder: Path,
    shards: list[dict],
    actor: type,
    actor_arguments: tuple,
    workers: EvaluateConfig,
) -> Iterator[dict[str, np.ndarray]]:
    """Records of all `shards`, in order: those in `folder` from an earlier run, the others computed now.

    A shard is plain data with a "count"; `actor(*actor_arguments)(shard)` gives its record as named arrays.
    """
    pending = [index for index in range(len(shards)) if not _record(folder, index).is_file()]
    total = sum(shard["count"] for shard in shards)
    done = total - sum(shards[index]["count"] for index in pending)
    progress = context.progress(stage, total=total, unit="images", start=done)
    if pending:
        ray_data = context.ray_data(workers, stage)
        rows = [{"index": index, "shard": json.dumps(shards[index])} for index in pending]
        finished = ray_data.from_items(rows, override_num_blocks=len(rows)).map(
            KeepRecord,
            fn_constructor_args=(folder, actor, actor_arguments),
            compute=ray_data.ActorPoolStrategy(size=min(workers.num_workers, len(rows))),
            # Half a CPU: actors that hold every CPU leave none for Ray Data's own tasks, and the job hangs.
            num_cpus=0.5,
            num_gpus=workers.gpus_per_worker,
        )
        for row in finished.iter_rows():
            progress.advance(shards[row["index"]]["count"])
    for index, shard in enumerate(shards):
        yield _checked_record(folder, index, shard["count"])


def _record(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.npz"


def _checked_record(folder: Path, index: int, count: int) -> dict[str, np.ndarray]:
    with np.load(_record(folder, index), allow_pickle=False) as file:
        record = dict(file)
    found = len(record["features"]) + len(record.get("unreadable", ()))
    if found != count:
        raise ValueError(f"{_record(folder, index)}: found {found} images, expected {count}. Delete it and run again")
    return record


class KeepRecord:
    """Runs an actor on a shard and writes what it returns, atomically."""

    def __init__(self, folder: Path, actor: type, arguments: tuple):
        self.folder = folder
        self.actor = actor(*arguments)

    def __call__(self, row: dict) -> dict:
        record = self.actor(json.loads(row["shard"]))
        buffer = io.BytesIO()
        np.savez(buffer, **record)
        storage.write_atomically(str(_record(self.folder, row["index"])), buffer.getvalue())
        return {"index": row["index"]}


class ScoreImages:
    """{"keys": [...]} -> features and logits of those images; unreadable ones are named, not dropped."""

    def __init__(self, images: ImagesConfig, config: EvaluateConfig):
        self.images = images
        self.extract = _extractor(config)

    def __call__(self, shard: dict) -> dict[str, np.ndarray]:
        from pipelines.preprocess import read_cropped

        images, _, errors = read_cropped(self.images, shard["keys"])
        return {**self.extract(images), "unreadable": np.array(sorted(errors), dtype=str)}


class ScoreSamples:
    """{"start": i, "stop": j} -> samples i..j-1 of a checkpoint, with their labels, features and logits."""

    def __init__(self, checkpoint: str, protocol: EvaluationProtocol, config: EvaluateConfig):
        from pipelines.sampling import Sampler

        self.extract = _extractor(config)
        device = "cuda" if config.gpus_per_worker else "cpu"
        self.sampler = Sampler(checkpoint, protocol, batch_size=config.batch_size, device=device)

    def __call__(self, shard: dict) -> dict[str, np.ndarray]:
        indices = range(shard["start"], shard["stop"])
        labels = self.sampler.labels(indices)
        images = self.sampler.sample(indices, labels)
        return {"indices": np.array(indices), "labels": labels, "images": images, **self.extract(images)}


def _extractor(config: EvaluateConfig):
    """uint8 (N, H, W, 3) -> {"features", "logits"[, "spatial"]}, on this worker's device and threads."""
    import torch

    from evaluation.extractors import create_extractor

    # The same number of threads on any number of workers: sums in another order differ in the last bits.
    torch.set_num_threads(config.cpus_per_worker)
    device = "cuda" if config.gpus_per_worker else "cpu"
    extractor = create_extractor(config.extractor, config.extractor_weights, device)

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        result = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        return {name: value for name, value in result._asdict().items() if value is not None}

    return extract
