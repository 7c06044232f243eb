"""Small pictures of known grey, intact and broken, and data sets of them in every layout."""

import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def square(value: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def value_of(image: Image.Image) -> int:
    """The grey of a square."""
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((0, 0))
    assert red == green == blue
    return red


def huge_png() -> bytes:
    """A few bytes whose header declares 3.6 billion pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def noise(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def broken_pictures() -> list[bytes]:
    """A truncated image, an empty file, a text file and a decompression bomb."""
    return [noise("JPEG")[:500], b"", b"plain text", huge_png()]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@dataclass(frozen=True)
class Picture:
    stem: str
    suffix: str
    label: int
    data: bytes
    value: int | None
    """Grey of every pixel; None if it is broken."""


CLASSES = ("ant", "bee", "cat")
KINDS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "bmp": {}}


def pictures(count: int = 100) -> list[Picture]:
    """In three classes and four formats, four of them broken."""
    broken = dict(zip(range(count // 6, count, count // 4), broken_pictures(), strict=True))
    found = []
    for index in range(count):
        suffix = [*KINDS][index % 4]
        sound = encoded(square(index), suffix.upper(), **KINDS[suffix])
        value = None if index in broken else index
        found.append(Picture(f"{index:03d}", suffix, index % 3, broken.get(index, sound), value))
    return found


def write_class_folders(folder: Path, found: list[Picture]) -> dict:
    for picture in found:
        write(folder / CLASSES[picture.label] / f"{picture.stem}.{picture.suffix}", picture.data)
    return {}


def write_with_table(folder: Path, found: list[Picture], suffix: str = "csv") -> dict:
    names = [f"{picture.stem}.{picture.suffix}" for picture in found]
    for name, picture in zip(names, found, strict=True):
        write(folder / "images" / name, picture.data)
    columns = {"file_name": [f"images/{name}" for name in names], "label": [CLASSES[one.label] for one in found]}
    table = folder / f"metadata.{suffix}"
    if suffix == "csv":
        pa.csv.write_csv(pa.table(columns), table)
    elif suffix == "parquet":
        pq.write_table(pa.table(columns), table)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in pa.table(columns).to_pylist()))
    return {}


def features(names: tuple[str, ...] = CLASSES) -> dict[str, str]:
    """The metadata of a schema as Hugging Face's data sets write it."""
    columns = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def image_table(found: list[Picture]) -> pa.Table:
    images = pa.array([{"bytes": one.data, "path": one.stem} for one in found])
    table = pa.table({"image": images, "label": [one.label for one in found]})
    return table.replace_schema_metadata(features())


def write_parquet(folder: Path, found: list[Picture]) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(2):
        part = found[index * len(found) // 2 : (index + 1) * len(found) // 2]
        pq.write_table(image_table(part), folder / f"part-{index}.parquet", row_group_size=7)
    return {}


def write_tar(path: Path, files: dict[str, bytes], **options) -> Path:
    """A tar of files in the order of their names in `files`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_webdataset(folder: Path, found: list[Picture]) -> dict:
    for index in range(3):
        files = {}
        for one in found[index * len(found) // 3 : (index + 1) * len(found) // 3]:
            files |= {f"{one.stem}.{one.suffix}": one.data, f"{one.stem}.cls": str(one.label).encode()}
        write_tar(folder / f"shard-{index:06d}.tar", files)
    return {"class_names": CLASSES}


def write_saved(folder: Path, found: list[Picture]) -> dict:
    """As `datasets` saves a data set with splits to disk."""
    table = image_table(found)
    for split, part in {"train": table, "test": table.slice(0, 5)}.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        names = [f"data-{index:05d}-of-00002.arrow" for index in range(2)]
        for name, rows in zip(names, (part.slice(0, len(part) // 2), part.slice(len(part) // 2)), strict=True):
            with pa.ipc.new_stream(folder / split / name, table.schema) as writer:
                writer.write_table(rows, max_chunksize=9)
        write(folder / split / "state.json", json.dumps({"_data_files": [{"filename": n} for n in names]}).encode())
    write(folder / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    return {}


def write_repository(folder: Path, found: list[Picture]) -> dict:
    """The files of a repository on the Hugging Face hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    half = len(found) // 2
    for name, part in {"train-00000-of-00002": found[:half], "train-00001-of-00002": found[half:]}.items():
        pq.write_table(image_table(part), folder / "data" / f"{name}.parquet", row_group_size=11)
    pq.write_table(image_table(found[:3]), folder / "data" / "test-00000-of-00001.parquet")
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
    card += "  - split: test\n    path: data/test-*\n"
    write(folder / "README.md", f"---\n{card}---\n# A data set\n".encode())
    return {}


LAYOUTS = {
    "folder": write_class_folders,
    "table": write_with_table,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "saved": write_saved,
    "repository": write_repository,
}
