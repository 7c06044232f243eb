"""`raydit latents show`: describe a latent data set in a few lines, and decode some of its rows."""

import numpy as np

from cluster import storage
from pipelines.images.grids import class_grid, require_png_name, save_png
from pipelines.latents import schema
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.samples import (
    decode_moments,
    encode_images,
    evenly_spaced,
    load_autoencoder,
    read_images,
    read_rows,
)

COLUMNS, MAX_CLASSES = 8, 20
"""Images of a class, and classes, that are shown."""
MAX_VALUES = 32
"""Most channels whose statistics are shown one by one."""

JSON_KEYS = {"std": "deviation"}
"""Keys of the command's JSON that are not the names in its table, by these: other programs read them."""


def show(dataset: LatentDataset, out: str | None) -> list[tuple[str, str]]:
    """Return a description as (name, text) lines. out: path or URI for a PNG, a labelled grid of some decoded rows.

    Raises InvalidInput for a name of another format than PNG.
    """
    if out is not None:
        require_png_name(out)
        storage.refuse_unwritable(out)
    autoencoder, pixels, names = dataset.autoencoder, dataset.preprocessing, dataset.class_names
    shown = ", ".join(names[:MAX_CLASSES]) + (", ..." if len(names) > MAX_CLASSES else "")
    means, stds = map(_values, dataset.statistics.values())
    stored = "" if dataset.stores_moments else "; not stored, training encodes the images"
    shape, flips = " x ".join(map(str, dataset.moments_shape)), ", with horizontal flips" if dataset.has_flip else ""
    lines = [
        ("latents", f"{len(dataset):,} in {len(dataset.shards)} shards, {dataset.num_bytes / 2**20:.1f} MiB"),
        ("quarantined", f"{dataset.num_quarantined:,}"),
        ("moments", f"{shape}{', deterministic' if dataset.is_deterministic else ''}{flips}{stored}"),
        ("images", f"{pixels['size']} px, crop {pixels['crop']!r}"),
        ("classes", f"{len(names)}: {shown}" if names else "none"),
        ("autoencoder", f"{autoencoder['id']} ({autoencoder['class']}, {autoencoder['sha256'][:12]})"),
        ("mean", means),
        ("std", stds),
        ("fingerprint", dataset.fingerprint),
    ]
    if out is not None:
        rows, network = read_rows(dataset, rows_to_show(dataset)), load_autoencoder(dataset, download=True)
        moments = encode_images(network, read_images(dataset, rows.keys)) if rows.moments is None else rows.moments
        images = decode_moments(network, moments)
        lines.append(("grid", save_png(class_grid(images, rows.labels, names, columns=COLUMNS), out)))
    return lines


def _values(values: list[float]) -> str:
    """Return a value for each channel, or only their range if there are many channels."""
    if len(values) > MAX_VALUES:
        return f"{min(values):.3g} to {max(values):.3g} in {len(values)} channels"
    return " ".join(f"{value:.3g}" for value in values)


def rows_to_show(dataset: LatentDataset) -> np.ndarray:
    """Return the positions of a few rows of each class, evenly spaced; of all rows if there are no classes."""
    if not dataset.class_names:
        return evenly_spaced(len(dataset), COLUMNS**2)
    tables = dataset.tables([schema.LABEL])
    labels = np.concatenate([table.column(schema.LABEL).to_numpy() for table in tables])
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)[:MAX_CLASSES]]
    return np.sort(np.concatenate([rows[evenly_spaced(len(rows), COLUMNS)] for rows in classes]))
