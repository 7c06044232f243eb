"""The encode job on every layout of images, some of them broken, from a disk and from a bucket."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from buckets import s3_bucket, s3_server  # noqa: F401
from hub import hub  # noqa: F401
from pictures import CLASSES, LAYOUTS, pictures, write_repository
from pyarrow.fs import LocalFileSystem, copy_files
from tiny_encode import encode_here, recipe

from cluster import storage
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.verify import verify

COUNT = 120
BROKEN = 4
"""Truncated, empty, a text file and a decompression bomb: 3% of the images."""
REASONS = [
    "DecompressionBombError: Image size (3600000000 pixels) exceeds limit of 178956970 pixels, could be decompression "
    "bomb DOS attack.",
    "OSError: ",
    "UnidentifiedImageError: no image format known here: 10 bytes from b'plain te'",
    "ValueError: empty: no bytes",
]


def overrides(path, settings: dict) -> list[str]:
    names = [f"images.{name}={list(value)}" for name, value in settings.items()]
    return [f"images.path={path}", *names, "encode.shard_rows=32", "encode.max_quarantined=0.05"]


@pytest.fixture
def encode(tmp_path, monkeypatch):
    """Encode a source, and check that every image is either encoded or quarantined."""

    def call(path, settings=None) -> LatentDataset:
        dataset = encode_here(recipe(tmp_path, *overrides(path, settings or {})), monkeypatch)
        assert dataset.class_names == CLASSES
        assert (len(dataset), dataset.num_quarantined) == (COUNT - BROKEN, BROKEN)
        reasons = sorted(row["error"] for row in pq.read_table(f"{dataset.path}/quarantine.parquet").to_pylist())
        assert all(found.startswith(reason) for found, reason in zip(reasons, REASONS, strict=True))
        checks = list(verify(dataset, sample=8))
        assert all(check.ok for check in checks) and "8 rows decode to" in checks[-1].found
        return dataset

    return call


def moments_by_class(dataset: LatentDataset) -> list[np.ndarray]:
    """Return the moments of each class, in an order that does not depend on keys."""
    arrays = dataset.arrays
    flat = arrays.moments.reshape(len(arrays.labels), -1)
    return [rows[np.lexsort(rows.T)] for rows in (flat[arrays.labels == label] for label in range(len(CLASSES)))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The latents of the same images in class folders on disk."""
    folder = tmp_path_factory.mktemp("expected")
    LAYOUTS["folder"](folder / "set", pictures(COUNT))
    with pytest.MonkeyPatch.context() as patch:
        return moments_by_class(encode_here(recipe(folder, *overrides(folder / "set", {})), patch))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_latents(encode, expected, tmp_path, name):
    settings = LAYOUTS[name](tmp_path / "set", pictures(COUNT))
    for found, wanted in zip(moments_by_class(encode(tmp_path / "set", settings)), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["parquet", "webdataset"])
@pytest.mark.slow
def test_a_bucket_gives_the_same_latents(encode, expected, tmp_path, s3_bucket, name):  # noqa: F811
    settings = LAYOUTS[name](tmp_path / "set", pictures(COUNT))
    uri = f"{s3_bucket}/set"
    filesystem, inner = storage.resolve(uri)
    copy_files(str(tmp_path / "set"), inner, LocalFileSystem(), filesystem)
    for found, wanted in zip(moments_by_class(encode(uri, settings)), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_hub_id_gives_the_same_latents(encode, expected, tmp_path, hub):  # noqa: F811
    write_repository(tmp_path / "set", pictures(COUNT))
    hub.commit("someone/pictures", tmp_path / "set", "main")
    for found, wanted in zip(moments_by_class(encode("someone/pictures")), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
