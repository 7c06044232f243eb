"""The table of what is fuzzed: valid files of each reader, and which of them are changed."""

import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pictures import encoded, noise, square, write, write_tar
from PIL import Image, features

from cluster.storage.lease import LEASE_FILE, LeaseOwner
from fuzz.artifacts import (
    make_adapter,
    make_card,
    make_journal,
    make_latents_without_moments,
    make_part,
    make_reference,
    make_report,
    make_shards,
    make_weights,
    repair_card,
)

PNG = encoded(square(3))
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Target:
    """A reader, and the valid files that it is given with changes."""

    reader: str
    """Its name in `hostile.READERS`."""
    make: Callable[[Path], Path]
    """Write valid files into a folder; return the path that the reader takes."""
    changed: str = "*"
    """Pattern of the names of the files that are changed, one at a time, in the folder and its subfolders."""
    repair: Callable[[bytes], bytes] | None = None
    """Restores checksums, without which a reader looks no further; half of the changed files are repaired."""
    tokens: tuple[bytes, ...] = ()
    """Pieces that mean something in the format."""


def make_images(folder: Path) -> Path:
    kinds = ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "TGA", "PCX", "SGI", "QOI", "DDS", "DIB"]
    kinds += [
        kind
        for kind, feature in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
        if features.check(feature)
    ]
    picture = Image.open(write(folder / "noise.png", noise("PNG"))).convert("RGB")
    for kind in kinds:
        write(folder / f"{kind.lower()}.{kind.lower().replace('jpeg2000', 'jp2')}", encoded(picture, kind))
    for name, mode in (("palette", "P"), ("alpha", "RGBA"), ("grey", "L"), ("bits", "1")):
        write(folder / f"{name}.png", encoded(picture.convert(mode)))
        write(folder / f"{name}.tiff", encoded(picture.convert(mode), "TIFF"))
    write(folder / "deep.png", encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999)))
    write(folder / "progressive.jpg", encoded(picture, "JPEG", progressive=True))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        write(folder / f"turned.{kind.lower()}", encoded(picture, kind, exif=exif))
    return folder


def make_tar(folder: Path) -> Path:
    files = {f"{n:04d}.{kind}": data for n in range(3) for kind, data in (("png", PNG), ("cls", b"%d" % n))}
    long = {f"{'a' * 120}/{n}.png": PNG for n in range(2)} | {
        f"{'a' * 120}/{n}.json": b'{"label": 3}' for n in range(2)
    }
    write_tar(folder / "gnu.tar", files, format=tarfile.GNU_FORMAT)
    write_tar(folder / "pax.tar", {**files, **{name.replace("a" * 120, "e"): data for name, data in long.items()}})
    write_tar(folder / "long.tar", {f"é{name}": data for name, data in long.items()}, format=tarfile.PAX_FORMAT)
    return folder


def repair_tar(data: bytes) -> bytes:
    """Write the right checksum into every block that may be a header."""
    changed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if changed[at] and changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def repair_png(data: bytes) -> bytes:
    """Write the right checksum behind every chunk of a PNG file; other files stay as they are."""
    changed, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        changed[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end])) if end + 4 <= len(data) else b""
        at = end + 4
    return bytes(changed[: len(data)])


def make_parquet(folder: Path) -> Path:
    labels = pa.array([0, 1, 0, 1] * 5)
    structs = pa.array([{"bytes": PNG, "path": "x.png"}] * 20)
    features = {
        "info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}, "image": {"_type": "Image"}}}
    }
    table = pa.table({"image": structs, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, write(folder / "a.parquet", b""), row_group_size=7)
    return folder


def make_parquet_of_lists(folder: Path) -> Path:
    table = pa.table({"image": pa.array([list(PNG)] * 9, pa.list_(pa.uint8())), "label": list(range(9))})
    pq.write_table(table, folder / "a.parquet", compression="zstd", data_page_version="2.0")
    return folder


def make_arrow(folder: Path) -> Path:
    batch = pa.record_batch({"image": pa.array([{"bytes": PNG, "path": None}] * 5), "label": list(range(5))})
    with pa.ipc.new_stream(folder / "data.arrow", batch.schema) as stream:
        stream.write_batch(batch)
        stream.write_batch(batch)
    write(folder / "state.json", b'{"_data_files": [{"filename": "data.arrow"}]}')
    return folder


def make_splits(folder: Path) -> Path:
    for name in ("train", "test"):
        (folder / name).mkdir()
        make_arrow(folder / name)
    write(folder / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    return folder


def make_hub_card(folder: Path) -> Path:
    card = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "data/train-*.parquet"
dataset_info: &info
  features:
  - name: image
    dtype: image
  - name: kind
    dtype:
      class_label:
        names: {'0': ant, '1': bee}
other: {<<: *info, x: 1}
---
# Title
"""
    write(folder / "README.md", card.encode())
    pq.write_table(pa.table({"image": [PNG] * 3, "kind": [0, 1, 0]}), write(folder / "data" / "train-0.parquet", b""))
    return folder


def make_infos(folder: Path) -> Path:
    infos = {"default": {"features": {"kind": {"_type": "ClassLabel", "names": ["ant", "bee"]}}}}
    write(folder / "dataset_infos.json", json.dumps(infos).encode())
    pq.write_table(pa.table({"image": [PNG] * 3, "kind": [0, 1, 0]}), folder / "train.parquet")
    return folder


def make_table(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        rows = [{"file_name": f"{n}.png", "label": f"class {n % 3}", "split": "train", "box": [1, 2]} for n in range(9)]
        for row in rows:
            write(folder / str(row["file_name"]), PNG)
        table = pa.Table.from_pylist(rows)
        if suffix == ".parquet":
            pq.write_table(table, folder / "metadata.parquet")
        elif suffix == ".jsonl":
            write(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        else:
            lines = ["file_name,label,split", *(f"{row['file_name']},{row['label']},train" for row in rows)]
            write(folder / "metadata.csv", "\n".join(lines).encode())
        return folder

    return make


def make_npz(folder: Path) -> Path:
    images, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 1, 2, 0])
    np.savez(folder / "x.npz", images, labels)
    return folder / "x.npz"


def make_compressed_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "x.npz", np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 1, 2, 0]))
    return folder / "x.npz"


def make_recipe(folder: Path) -> Path:
    return write(folder / "recipe.toml", (ROOT / "pipelines" / "recipes" / "digits.toml").read_bytes())


def make_lease(folder: Path) -> Path:
    owner = replace(LeaseOwner.this_process(), machine="elsewhere", expires=1.0)
    return write(folder / LEASE_FILE, json.dumps(asdict(owner)).encode())


TOML = (b"[a]\n", b"[[a]]\n", b"a.b.c = ", b'"""', b"0x", b"2020-01-01", b"inf")
TARGETS: dict[str, Target] = {
    "images": Target("images", make_images, "*.*", repair_png),
    "tar": Target("images", make_tar, "*.tar", repair_tar, (b"11 size=-1\n", b"\x80" + b"\xff" * 11, b"0 path=a\n")),
    "parquet": Target("images", make_parquet, "*.parquet"),
    "parquet of lists": Target("images", make_parquet_of_lists, "*.parquet"),
    "arrow": Target("images", make_arrow, "*.arrow"),
    "state of save_to_disk": Target("images", make_arrow, "state.json"),
    "splits of save_to_disk": Target("images", make_splits, "dataset_dict.json"),
    "card": Target("images", make_hub_card, "README.md"),
    "infos": Target("images", make_infos, "dataset_infos.json"),
    "csv": Target("images", make_table(".csv"), "metadata.csv"),
    "jsonl": Target("images", make_table(".jsonl"), "metadata.jsonl", tokens=(b"\\", b'\\"', b"\\u0000", b"]]", b"}}")),
    "table in parquet": Target("images", make_table(".parquet"), "metadata.parquet"),
    "npz": Target("images", make_npz, "x.npz"),
    "compressed npz": Target("images", make_compressed_npz, "x.npz"),
    "recipe": Target("recipe", make_recipe, "recipe.toml", tokens=TOML),
    "lease": Target("lease", make_lease, LEASE_FILE),
    "checkpoint": Target("checkpoint", make_part("checkpoints/step_0000002")),
    "signed checkpoint": Target("signed checkpoint", make_part("checkpoints/step_0000002"), "*[!E]"),
    "record of a checkpoint": Target("signed checkpoint", make_part("checkpoints/step_0000002"), "config.json"),
    "latents": Target("latents", make_part("latents"), "*.parquet"),
    "manifest": Target("latents", make_part("latents"), "manifest.json"),
    "autoencoder": Target("autoencoder", make_part("autoencoder"), "config.json"),
    "weights of an autoencoder": Target("autoencoder", make_part("autoencoder"), "*.safetensors"),
    "official weights": Target("official", make_weights),
    "shards of weights": Target("official", make_shards),
    "adapter": Target("adapter", make_adapter),
    "latents without moments": Target("latents without moments", make_latents_without_moments, "*.parquet"),
    "manifest without moments": Target("latents without moments", make_latents_without_moments, "manifest.json"),
    "reference": Target("reference", make_reference),
    "report": Target("report", make_report),
    "evaluation card": Target("evaluation card", make_card, repair=repair_card),
    "journal": Target("journal", make_journal),
}
"""What is fuzzed, by name. A further reader needs an entry here, and one in `hostile.READERS`."""
