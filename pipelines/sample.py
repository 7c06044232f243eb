"""The sample job: many samples of a checkpoint in one file, for other tools."""

import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster import storage
from dit.files import publish
from evaluation.protocol import shard_ranges
from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.scoring.protocols import sampling_protocol
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

    They are those that an evaluation by the same settings would score: sample i depends on (seed, i) only. Shards
    are kept beside `out`, a path or URI, until it is whole, so that the same command goes on after an interruption.
    address: of Ray. Raises FileExistsError if `out` is there.
    """
    from pipelines.artifacts import digest_of
    from pipelines.scoring.actors import (
        SampleActor,
        Source,
        compute_features,
        make_shards,
        read_records,
        temporary_shard_dir,
    )

    storage.refuse_existing(out)
    out, opened = storage.absolute(out), open_checkpoint(checkpoint)
    protocol = sampling_protocol(config, opened)
    parts = shard_ranges(num_samples, config.evaluate.shard_rows)
    identity = digest_of({"checkpoint": opened.digest, "protocol": protocol.to_dict(), "parts": list(map(str, parts))})
    folder = temporary_shard_dir(out, identity)
    shards = make_shards(folder, parts)
    # Nobody else works on this file meanwhile; the checkpoint's own output may be trained in.
    with StageContext(replace(config, output=folder), address=address) as context:
        arguments = (config.evaluate, [Source(opened.shared, protocol)])
        compute_features(context, "sample", shards, arguments, config.evaluate, actor=SampleActor)
        write_whole(out, lambda file: write_adm(file, read_records(shards), num_samples))
    storage.remove_folder(folder)  # not earlier: the lease would be written into it once more
    return out


def write_whole(place: str, write: Callable[[Path], None]) -> None:
    """Have `write` make a local file, which then appears at a path or URI."""
    if storage.is_local(place):
        publish(Path(storage.local_path(place)), write)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole"
        write(file)
        storage.upload_file(str(file), place)


def write_adm(path: Path, records: Iterable[dict[str, np.ndarray]], num_samples: int) -> None:
    """Write records' images and labels as np.savez would, holding one record's images at a time."""
    labels: list[np.ndarray] = []
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            for record in records:
                images = record["images"]
                if not labels:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())
                labels.append(record["labels"])
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, np.concatenate(labels))
