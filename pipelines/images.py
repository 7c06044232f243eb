"""Image sources: every image under a stable key, with its label, decoded only when asked for.

A source lists first and reads later, so that a plan is made before any pixel is touched and a worker reads
only its share. A key names an image within its source and is all that is needed to read it again.
"""

import hashlib
import importlib.util
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.config import ImagesConfig

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Listing:
    """All images of a source in their stable order, before any is decoded."""

    keys: list[str]
    labels: np.ndarray
    """int32, one for each key; 0 throughout where there are no classes."""
    sizes: np.ndarray
    """int64, bytes of each image; 0 where the source does not know."""
    class_names: tuple[str, ...]
    """Empty for images without classes."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def digest(self) -> str:
        """sha256 over keys, labels and sizes: changes when images come, go or are replaced."""
        digest = hashlib.sha256(json.dumps([self.keys, self.class_names]).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update(self.sizes.astype("<i8").tobytes())
        return digest.hexdigest()

    def split(self, held_out: float) -> tuple["Listing", "Listing"]:
        """Training and held-out images. An image's side depends on its key alone, so growth moves none."""
        aside = np.array([_hash_fraction(key) < held_out for key in self.keys], dtype=bool)
        return self._where(~aside), self._where(aside)

    def _where(self, mask: np.ndarray) -> "Listing":
        keys = [key for key, keep in zip(self.keys, mask, strict=True) if keep]
        return Listing(keys, self.labels[mask], self.sizes[mask], self.class_names)


def _hash_fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class ImageSource(Protocol):
    """What every source of images can do."""

    def listing(self) -> Listing:
        """All images, in an order that does not change from call to call."""
        ...

    def read(self, keys: Sequence[str]) -> Iterator["Image.Image | Exception"]:
        """The images of `keys`, in order; the reason in place of an image that cannot be read."""
        ...


def open_source(config: "ImagesConfig") -> ImageSource:
    """The source that a recipe's [images] names. Raises FileNotFoundError or ValueError, telling what to do."""
    if config.path == "digits" and config.format in (None, "digits"):
        return DigitsSource()
    path = Path(config.path).absolute()
    if not path.exists():
        raise FileNotFoundError(
            f'images.path: nothing at {path}; expected a folder of images, a Parquet file or folder, or "digits"'
        )
    kind = config.format or _recognise(path)
    if kind == "parquet":
        return ParquetSource(path)
    if kind == "folder":
        return FolderSource(path)
    raise ValueError(f'images.format: found "digits" with images.path = {config.path!r}; set path = "digits" too')


def _recognise(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".parquet":
            return "parquet"
        raise ValueError(f"images.path: found the file {path}; expected a folder of images or a .parquet file")
    return "parquet" if any(path.glob("*.parquet")) else "folder"


class DigitsSource:
    """The 1,797 handwritten digits (8x8, 17 grey levels) of Alpaydin & Kaynak 1998 that scikit-learn ships."""

    def listing(self) -> Listing:
        labels = _digits()[1]
        keys = [f"digits#{index:04d}" for index in range(len(labels))]
        return Listing(keys, labels, np.zeros(len(labels), np.int64), tuple("0123456789"))

    def read(self, keys: Sequence[str]) -> Iterator["Image.Image | Exception"]:
        from PIL import Image

        images = _digits()[0]
        for key in keys:
            yield Image.fromarray(images[int(key.partition("#")[2])])


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    # The file that sklearn.datasets.load_digits reads; importing scikit-learn takes every worker two seconds.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None, "scikit-learn is a dependency of raydit"
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return images, table[:, -1].astype(np.int32)


class FolderSource:
    """A folder for each class (sorted names are the classes), or one folder of images without classes."""

    def __init__(self, root: Path):
        self.root = root

    def listing(self) -> Listing:
        files = sorted(
            (file for file in self.root.rglob("*") if file.suffix.lower() in SUFFIXES and self._shows(file)),
            key=lambda file: file.relative_to(self.root).as_posix(),
        )
        if not files:
            raise FileNotFoundError(
                f"images.path: no images in {self.root}; expected files ending in {', '.join(sorted(SUFFIXES))}, in "
                "a folder for each class or all in one"
            )
        parts = [file.relative_to(self.root).parts for file in files]
        loose = [part[0] for part in parts if len(part) == 1]
        if loose and len(loose) < len(files):
            raise ValueError(
                f"images.path: {self.root} holds class folders and loose images such as {loose[0]}; expected one or "
                "the other. Move the loose images into a folder of their class"
            )
        names = () if loose else tuple(sorted({part[0] for part in parts}))
        index = {name: label for label, name in enumerate(names)}
        return Listing(
            keys=["/".join(part) for part in parts],
            labels=np.array([index.get(part[0], 0) for part in parts], np.int32),
            sizes=np.array([file.stat().st_size for file in files], np.int64),
            class_names=names,
        )

    def _shows(self, file: Path) -> bool:
        """A file that is not hidden, nor in a hidden folder: .ipynb_checkpoints is no class."""
        return not any(part.startswith(".") for part in file.relative_to(self.root).parts) and file.is_file()

    def read(self, keys: Sequence[str]) -> Iterator["Image.Image | Exception"]:
        for key in keys:
            try:
                yield decode((self.root / key).read_bytes())
            except Exception as error:
                yield error


class ParquetSource:
    """Parquet files with a column of encoded images, in the layout of Hugging Face data sets.

    The image column is binary or a struct with a field `bytes`; the label column holds integers, and class
    names come from the data set's own metadata where it has them.
    """

    IMAGE_COLUMNS = ("image", "img", "jpg", "png")
    LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")

    def __init__(self, path: Path):
        self.root = path if path.is_dir() else path.parent
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]

    def listing(self) -> Listing:
        import pyarrow.parquet as pq

        if not self.files:
            raise FileNotFoundError(f"images.path: no Parquet files in {self.root}; expected files ending in .parquet")
        keys: list[str] = []
        labels, sizes = [], []
        class_names: tuple[str, ...] = ()
        for file in self.files:
            parquet = pq.ParquetFile(file)
            _, label = self._columns(parquet)
            rows = parquet.metadata.num_rows
            keys += [f"{file.name}#{row:07d}" for row in range(rows)]
            sizes.append(np.full(rows, file.stat().st_size, np.int64))
            class_names = class_names or _class_names(parquet.schema_arrow.metadata, label)
            labels.append(_labels(parquet, label, file) if label else np.zeros(rows, np.int32))
        all_labels = np.concatenate(labels)
        if not class_names and label:
            class_names = tuple(str(index) for index in range(int(all_labels.max(initial=-1)) + 1))
        return Listing(keys, all_labels, np.concatenate(sizes), class_names)

    def _columns(self, parquet) -> tuple[str, str | None]:
        names = parquet.schema_arrow.names
        image = next((name for name in self.IMAGE_COLUMNS if name in names), None)
        if image is None:
            raise ValueError(
                f"images.path: {parquet.name if hasattr(parquet, 'name') else self.root} has the columns "
                f"{', '.join(names)}; expected one of {', '.join(self.IMAGE_COLUMNS)} with encoded images"
            )
        return image, next((name for name in self.LABEL_COLUMNS if name in names), None)

    def read(self, keys: Sequence[str]) -> Iterator["Image.Image | Exception"]:
        places = [(name, int(row)) for name, _, row in (key.partition("#") for key in keys)]
        for name, group in groupby(places, key=lambda place: place[0]):
            yield from self._read_rows(self.root / name, [row for _, row in group])

    def _read_rows(self, file: Path, rows: list[int]) -> Iterator["Image.Image | Exception"]:
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(file)
        image, _ = self._columns(parquet)
        counts = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *counts])
        current = -1
        column: Any = None
        for row in rows:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            if group != current:
                current, column = group, parquet.read_row_group(group, columns=[image]).column(0)
            cell = column[row - starts[group]].as_py()
            try:
                yield decode(cell["bytes"] if isinstance(cell, dict) else cell)
            except Exception as error:
                yield error


def _labels(parquet, label: str, file: Path) -> np.ndarray:
    """The label column as int32. Raises ValueError unless every label is a class number."""
    column = parquet.read(columns=[label]).column(label).to_numpy()
    if column.dtype.kind not in "iu" or column.min(initial=0) < 0:
        wrong = next((v for v in column.tolist() if not isinstance(v, int) or v < 0), column.dtype.name)
        raise ValueError(
            f"images.path: {file}: found {wrong!r} in the column {label}, expected integers from 0 in every row. "
            "Number the classes, and leave out images without one"
        )
    return column.astype(np.int32)


def _class_names(metadata: dict | None, label: str | None) -> tuple[str, ...]:
    info = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    feature = info.get("info", {}).get("features", {}).get(label) or {}
    return tuple(feature.get("names", ()))


def decode(data: bytes | None) -> "Image.Image":
    """Encoded bytes -> RGB image, turned upright by its EXIF tag; transparency is laid over white."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise ValueError("empty: no bytes")
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        # Pillow's own words hold an address in memory; what is written down of an image must not change by the run.
        raise UnidentifiedImageError(f"no image format known here: {len(data):,} bytes from {data[:8]!r}") from error
    image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")
