"""The sample job: many samples of a checkpoint in one file, for other tools."""

import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cluster import storage
from dit.files import publish
from evaluation.protocol import shard_ranges
from pipelines.artifacts import digest_of
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.scoring.checks import check_sampling_steps
from pipelines.scoring.protocols.build_protocol import sampling_protocol
from pipelines.scoring.sample_grid import class_label  # noqa: F401  older served models import it from here
from pipelines.scoring.samples.guide import guide_location
from pipelines.scoring.samples.precision import check_precision, faster_precisions
from pipelines.scoring.workers.actors import SampleActor, SampleSource
from pipelines.scoring.workers.records import ShardResult, read_results
from pipelines.scoring.workers.shards import compute_shards, make_shards, temporary_shard_dir
from pipelines.stage import StageContext


def sample_file(
    checkpoint: str | Path | LocatedCheckpoint,
    config: Recipe,
    out: str,
    *,
    num_samples: int,
    address: str | None = None,
) -> str:
    """Write samples 0 to num_samples - 1 as ADM's .npz: arr_0 uint8 (N, H, W, 3), arr_1 int64 labels (N,).

    They are the samples that an evaluation with the same settings would score: sample i depends on (seed, i) only.
    Shards are kept next to `out`, a path or URI, until it is complete, so that the same call resumes after an
    interruption. address: of Ray. Raises AlreadyExists if there is a file at `out`.
    """
    storage.refuse_existing(out)
    out, opened, evaluate = storage.absolute(out), open_checkpoint(checkpoint), config.evaluate
    check_sampling_steps(evaluate, opened.record.process_kind)
    protocol = sampling_protocol(evaluate, config.seed, opened, config.random)
    check_precision(evaluate, protocol)
    parts = shard_ranges(num_samples, evaluate.shard_rows)
    identity = digest_of({"checkpoint": opened.digest, "protocol": protocol.to_dict(), "parts": list(map(str, parts))})
    folder = temporary_shard_dir(out, identity)
    shards = make_shards(folder, parts)
    # The context locks the folder of the shards; the checkpoint's own output may be in use by a training.
    with StageContext(replace(config, output=folder), address=address) as context:
        for line in faster_precisions(evaluate, protocol):
            context.say("sample", line)
        source = SampleSource(opened.shared, protocol, guide=guide_location(protocol, evaluate, opened))
        create_actor = partial(SampleActor, evaluate, [source])
        compute_shards(context, "sample", shards, create_actor, evaluate)
        write_local_or_remote(out, lambda file: write_adm(file, read_results(shards), num_samples))
    storage.remove_folder(folder)  # not earlier: the lease would be written into it again
    return out


def write_local_or_remote(target: str, write: Callable[[Path], None]) -> None:
    """Let `write` make a local file, and then move or upload it to a path or URI."""
    if storage.is_local(target):
        publish(Path(storage.local_path(target)), write)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples"
        write(file)
        storage.upload_file(str(file), target)


def write_adm(path: Path, records: Iterable[ShardResult], num_samples: int) -> None:
    """Write records' images and labels as np.savez would, with one record's images in memory at a time."""
    labels: list[np.ndarray] = []
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            for record in records:
                assert record.images is not None and record.labels is not None, "SampleActor writes both"
                if not labels:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *record.images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(record.images.tobytes())
                labels.append(record.labels)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, np.concatenate(labels))
