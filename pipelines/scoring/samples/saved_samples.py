"""Samples saved for other tools: Parquet files as Hugging Face lays them out, or PNG files in class folders.

Both can be read as images again: `raydit evaluate --images FOLDER` scores them.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster import storage
from pipelines.images.grids import encode_png
from raydit.errors import AlreadyExists, InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

SampleFormat = Literal["parquet", "png"]
RECORDS = ".records"
SOURCE_FILE = "source.json"
"""File among the records that says what a folder's samples were drawn from."""


@dataclass(frozen=True)
class SavedSamples:
    """A folder or URI that workers write sampled images into, shard by shard."""

    folder: str
    format: SampleFormat = "parquet"
    class_names: tuple[str, ...] = ()

    def file(self, shard: int) -> str:
        """Return the file that exists once a shard is written: its images, or for PNG an empty, hidden file."""
        if self.format == "parquet":
            return storage.join(self.folder, f"part-{shard:05d}.parquet")
        return storage.join(self.folder, RECORDS, f"part-{shard:05d}")

    def refuse_other_samples(self, source: dict[str, Any]) -> None:
        """Raise AlreadyExists if the folder holds anything but samples of this source, whose missing ones are written.

        source: what the samples are drawn from, as JSON values by name. Raises InvalidInput for a folder that is
        deleted with the job.
        """
        storage.refuse_job_folder(self.folder)
        found = self._read_source()
        if found == source or not (self._list_shown("") or self._list_shown(RECORDS, SOURCE_FILE)):
            return
        differing = [name for name in source if found.get(name) != source[name]]
        what = f"samples with another {', '.join(differing)}" if found else "files of unknown origin"
        raise AlreadyExists(
            f"--save-images: found {what} in {self.folder}",
            "an empty folder, or one in which this evaluation was interrupted",
            "name another folder, or delete this one",
        )

    def holds_all(self, source: dict[str, Any], num_shards: int) -> bool:
        """Return whether the folder holds all shards of the samples of a source."""
        written = storage.list_files(storage.split(self.file(0))[0])
        names = (storage.split(self.file(shard))[1] for shard in range(num_shards))
        return self._read_source() == source and all(name in written for name in names)

    def write_source(self, source: dict[str, Any]) -> None:
        """Record what the folder's samples are drawn from, before the first is written."""
        storage.write_json_atomically(storage.join(self.folder, RECORDS, SOURCE_FILE), source)

    def _read_source(self) -> dict[str, Any]:
        """Return what `write_source` recorded; empty if there is no such record, or if it cannot be read."""
        file = storage.join(self.folder, RECORDS, SOURCE_FILE)
        try:
            found = storage.read_json(file) if storage.exists(file) else {}
        except InvalidInput:
            return {}
        return found if isinstance(found, dict) else {}

    def _list_shown(self, subfolder: str, *left_out: str) -> list[str]:
        """Return the names in a subfolder, without hidden ones, which readers of images leave out, and those given."""
        folder = storage.join(self.folder, subfolder) if subfolder else self.folder
        names = storage.list_names(folder) if storage.exists(folder) else []
        return [name for name in names if not name.startswith(".") and name not in left_out]

    def write(self, file: str, images: np.ndarray, labels: np.ndarray, indices: Sequence[int]) -> None:
        """Write the images of a shard; `file`, as named by the method `file`, is written last and atomically.

        images: uint8 (N, H, W, 3). labels: (N,). indices: of the samples, for the files' names.
        """
        encoded = [_encode_png(image) for image in images]
        if self.format == "parquet":
            storage.write_atomically(file, self._parquet_bytes(encoded, labels, indices))
            return
        for data, label, index in zip(encoded, labels, indices, strict=True):
            class_folder = [name_class_folder(int(label), self.class_names)] if self.class_names else []
            storage.write_atomically(storage.join(self.folder, *class_folder, f"{index:07d}.png"), data)
        storage.write_atomically(file, b"")

    def _parquet_bytes(self, encoded: list[bytes], labels: np.ndarray, indices: Sequence[int]) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = [{"bytes": data, "path": f"{index:07d}.png"} for data, index in zip(encoded, indices, strict=True)]
        columns = {"image": files, "label": labels.astype(np.int64), "index": list(indices)}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=self._schema()), buffer, compression="none")
        return buffer.getvalue()

    def _schema(self) -> "pa.Schema":
        import pyarrow as pa

        integer = {"dtype": "int64", "_type": "Value"}
        label = {"names": list(self.class_names), "_type": "ClassLabel"} if self.class_names else integer
        features = {"image": {"_type": "Image"}, "label": label, "index": integer}
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        return pa.schema(
            [("image", image), ("label", pa.int64()), ("index", pa.int64())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )


def name_class_folder(label: int, class_names: Sequence[str]) -> str:
    """Return the name of a class's folder, which sorts as the labels do; names of classes may hold any character."""
    number = str(label).zfill(max(4, len(str(len(class_names) - 1))))
    name = name_in_folder(class_names[label])
    return f"{number}-{name}" if name else number


def name_in_folder(class_name: str) -> str:
    """Return what the folder of a class has of its name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in class_name)


def _encode_png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (H, W, 3), as a PNG file."""
    from PIL import Image

    return encode_png(Image.fromarray(image))
