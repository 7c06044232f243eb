"""Sampled images written for others: Parquet files as Hugging Face lays them out, or PNG files in class folders.

Both are sources of images again: `raydit evaluate --images FOLDER` scores them.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cluster import storage
from pipelines.images.grids import png_of

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["parquet", "png"]
RECORDS = ".records"


@dataclass(frozen=True)
class KeptImages:
    """A folder, or a URI of one, that workers write shards of samples into."""

    folder: str
    format: Format = "parquet"
    class_names: tuple[str, ...] = ()

    def file(self, shard: int) -> str:
        """What is there when a shard is written; hidden where it is not images itself."""
        if self.format == "parquet":
            return storage.join(self.folder, f"part-{shard:05d}.parquet")
        return storage.join(self.folder, RECORDS, f"part-{shard:05d}")

    def write(self, file: str, images: np.ndarray, labels: np.ndarray, indices: Sequence[int]) -> None:
        """images: uint8 (N, H, W, 3), labels: (N,). What `file` names comes last, atomically."""
        encoded = [_png(image) for image in images]
        if self.format == "parquet":
            storage.write_atomically(file, self._parquet(encoded, labels, indices))
            return
        for data, label, index in zip(encoded, labels, indices, strict=True):
            below = [self._class(int(label))] if self.class_names else []
            storage.write_atomically(storage.join(self.folder, *below, f"{index:07d}.png"), data)
        storage.write_atomically(file, b"")

    def _class(self, label: int) -> str:
        """A folder's name that sorts as the labels do; names of classes may hold anything."""
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.class_names[label])
        return f"{label:04d}-{name}" if name else f"{label:04d}"

    def _parquet(self, encoded: list[bytes], labels: np.ndarray, indices: Sequence[int]) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self._schema()
        pictures = [{"bytes": data, "path": f"{index:07d}.png"} for data, index in zip(encoded, indices, strict=True)]
        columns = {"image": pictures, "label": labels.astype(np.int64), "index": list(indices)}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), buffer, compression="none")
        return buffer.getvalue()

    def _schema(self) -> "pa.Schema":
        import pyarrow as pa

        label = {"names": list(self.class_names), "_type": "ClassLabel"} if self.class_names else _value("int64")
        features = {"image": {"_type": "Image"}, "label": label, "index": _value("int64")}
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        return pa.schema(
            [("image", image), ("label", pa.int64()), ("index", pa.int64())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )


def _value(dtype: str) -> dict:
    return {"dtype": dtype, "_type": "Value"}


def _png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> the bytes of a PNG file."""
    from PIL import Image

    return png_of(Image.fromarray(image))
