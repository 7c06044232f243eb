"""Looking at rows of a latent data set, as images again: `raydit latents show`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster import storage
from pipelines.images.grids import class_grid, save_png
from pipelines.latents import schema
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.dataset import LatentDataset

COLUMNS, MOST_CLASSES = 8, 20


def show(dataset: LatentDataset, out: Path | None) -> list[tuple[str, str]]:
    """What a data set is, as (name, text); with `out`, some of its rows decoded as a labelled grid."""
    manifest = dataset.manifest
    autoencoder, pixels = manifest["autoencoder"], manifest["preprocessing"]
    names = dataset.class_names
    shown = ", ".join(names[:MOST_CLASSES]) + (", ..." if len(names) > MOST_CLASSES else "")
    means, deviations = (" ".join(f"{value:.3g}" for value in manifest[f"latents_{name}"]) for name in ("mean", "std"))
    lines = [
        ("latents", f"{len(dataset):,} in {len(manifest['shards'])} shards, {dataset.num_bytes / 2**20:.1f} MiB"),
        ("quarantined", f"{manifest['quarantined']:,}"),
        ("moments", f"{' x '.join(map(str, manifest['moments_shape']))}{', with mirrors' if manifest['flip'] else ''}"),
        ("images", f"{pixels['size']} px, crop {pixels['crop']!r}"),
        ("classes", f"{len(names)}: {shown}" if names else "none"),
        ("autoencoder", f"{autoencoder['id']} ({autoencoder['class']}, {autoencoder['sha256'][:12]})"),
        ("mean", means),
        ("deviation", deviations),
        ("fingerprint", dataset.fingerprint),
    ]
    if out is not None:
        rows = read_rows(dataset, rows_to_show(dataset))
        images = decode(load_autoencoder(dataset, download=True), rows.moments)
        lines.append(("grid", save_png(class_grid(images, rows.labels, names, columns=COLUMNS), str(out))))
    return lines


def rows_to_show(dataset: LatentDataset) -> np.ndarray:
    """Positions of a few rows of each class, evenly spaced; of all rows where there are no classes."""
    if not dataset.class_names:
        return spaced(len(dataset), COLUMNS**2)
    tables = dataset.tables([schema.LABEL])
    labels = np.concatenate([table.column(schema.LABEL).to_numpy() for table in tables])
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)[:MOST_CLASSES]]
    return np.sort(np.concatenate([place[spaced(len(place), COLUMNS)] for place in places]))


@dataclass(frozen=True)
class Rows:
    keys: list[str]
    labels: np.ndarray
    moments: np.ndarray
    """float16 (N, 2C, H, W), as `moments_flip` where there are mirrors."""
    moments_flip: np.ndarray | None


def spaced(length: int, count: int) -> np.ndarray:
    """At most `count` positions, evenly spaced over `length`."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))


def read_rows(dataset: LatentDataset, positions: np.ndarray) -> Rows:
    """Rows by their position in the data set, in order. Raises ValueError if there are none, or a shard is broken."""
    import pyarrow as pa

    if not len(positions):
        raise ValueError(f"{dataset.path} has no rows; see quarantine.parquet there")
    parts, first = [], 0
    for table in dataset.tables():
        inside = positions[(positions >= first) & (positions < first + table.num_rows)]
        parts.append(table.take(pa.array(inside - first)))
        first += table.num_rows
    table, shape = pa.concat_tables(parts), tuple(dataset.manifest["moments_shape"])
    flip = schema.MOMENTS_FLIP in table.column_names
    return Rows(
        keys=table.column(schema.KEY).to_pylist(),
        labels=table.column(schema.LABEL).to_numpy(),
        moments=schema.moments_array(table.column(schema.MOMENTS), shape),
        moments_flip=schema.moments_array(table.column(schema.MOMENTS_FLIP), shape) if flip else None,
    )


def read_images(dataset: LatentDataset, keys: list[str]) -> np.ndarray:
    """The images that rows were made from, uint8 (N, size, size, 3). Raises an error if any is gone."""
    from pipelines.config.reader import validate_recipe
    from pipelines.images.preprocess import read_cropped

    images, _, errors = read_cropped(validate_recipe(dataset.manifest["recipe"]).images, keys)
    if errors:
        key, error = next(iter(errors.items()))
        raise ValueError(f"{len(errors)} of {len(keys)} images cannot be read any more, such as {key}: {error}")
    return images


def load_autoencoder(dataset: LatentDataset, *, download: bool):
    """The autoencoder that made a data set. Raises FileNotFoundError, or ValueError if it is another one."""
    from dit.autoencoder import Autoencoder, describe_autoencoder

    recorded = dataset.manifest["autoencoder"]
    # One trained by us lies beside the latents: output/autoencoder and output/latents.
    folder = AutoencoderHandle(recorded["id"], storage.split(dataset.path)[0]).folder(download=download)
    found = describe_autoencoder(folder)["sha256"]
    if found != recorded["sha256"]:
        raise ValueError(
            f"the autoencoder in {folder} has sha256 {found[:12]}, {dataset.path} was made by one with "
            f"{recorded['sha256'][:12]}; put that one back"
        )
    return Autoencoder.load(folder)


def decode(autoencoder, moments: np.ndarray) -> np.ndarray:
    """Moments (N, 2C, H, W) -> images uint8 (N, H, W, 3) of the posterior means."""
    means = np.split(moments.astype(np.float32), 2, axis=1)[0]
    batches = tensor(means).split(16)
    return np.concatenate([autoencoder.decode(autoencoder.scale.scale(batch)).numpy() for batch in batches])


def encode(autoencoder, images: np.ndarray) -> np.ndarray:
    """Images uint8 (N, H, W, 3) -> moments float32 (N, 2C, H, W)."""
    from dit.autoencoder import images_from_uint8

    return np.concatenate([autoencoder.encode(images_from_uint8(b)).numpy() for b in tensor(images).split(16)])


def tensor(array: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
