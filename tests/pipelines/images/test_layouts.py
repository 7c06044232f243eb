"""Every layout of images, on disk and in buckets, gives the same keys, labels, pixels and quarantine reasons."""

import errno
import os
import random
import shutil

import pyarrow as pa
import pytest
from pictures import CLASSES, LAYOUTS, pictures, value_of
from pyarrow.fs import LocalFileSystem, copy_files

from cluster import storage
from cluster.storage import object_stores, paths
from pipelines.config.recipe import ImagesConfig
from pipelines.images import source_files
from pipelines.images.decoding import quarantine_reason
from pipelines.images.open import open_source

COUNT = 40
SOUND = {picture.value for picture in pictures(COUNT) if picture.value is not None}


def contents(listing, images) -> list[tuple]:
    """Return (key, class, grey or quarantine reason) of every image."""
    shown = [quarantine_reason(image) if isinstance(image, Exception) else value_of(image) for image in images]
    return list(zip(listing.keys, [listing.class_names[label] for label in listing.labels], shown, strict=True))


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    """A data set on disk, and the settings that it needs."""
    settings = LAYOUTS[request.param](tmp_path / "set", pictures(COUNT))
    return tmp_path / "set", settings


def test_every_layout_gives_the_same_images_classes_and_reasons(layout):
    folder, settings = layout
    source = open_source(ImagesConfig(path=str(folder), **settings))
    listing = source.listing()
    assert len(listing) == len(set(listing.keys)) == COUNT and listing.class_names == CLASSES
    found = contents(listing, source.read(listing.keys, listing.locations))
    assert {value for _, _, value in found if isinstance(value, int)} == SOUND and len(SOUND) == COUNT - 4
    assert all(CLASSES.index(name) == value % 3 for _, name, value in found if isinstance(value, int))
    assert sorted(value.partition(":")[0] for _, _, value in found if isinstance(value, str)) == [
        "DecompressionBombError",
        "OSError",
        "UnidentifiedImageError",
        "ValueError",
    ]


def test_images_are_read_in_any_order_and_without_their_locations(layout):
    folder, settings = layout
    source = open_source(ImagesConfig(path=str(folder), **settings))
    listing = source.listing()
    expected = contents(listing, source.read(listing.keys, listing.locations))
    order = random.Random(0).sample(range(COUNT), 20)
    fresh = open_source(ImagesConfig(path=str(folder), **settings))
    locations = None if listing.locations is None else listing.locations[order]
    for given in (locations, None):
        images = fresh.read([listing.keys[index] for index in order], given)
        shown = [quarantine_reason(image) if isinstance(image, Exception) else value_of(image) for image in images]
        assert shown == [expected[index][2] for index in order]


class FailingFile:
    """A file on a disk that fails."""

    closed = False

    def close(self):
        self.closed = True

    def tell(self):
        return 10**6  # asked for its length, it says so

    def seek(self, offset, whence=0):
        return offset

    def read(self, size=-1):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_errors_of_the_disk_are_raised_and_quarantine_no_image(layout, monkeypatch):
    folder, settings = layout
    source = open_source(ImagesConfig(path=str(folder), **settings))
    listing = source.listing()
    monkeypatch.setattr(source_files.Files, "open", lambda *_: pa.PythonFile(FailingFile(), mode="r"))
    monkeypatch.setattr(pa, "memory_map", lambda *_: pa.PythonFile(FailingFile(), mode="r"))
    monkeypatch.setattr(source_files, "read_regular", lambda *_: FailingFile().read())
    with pytest.raises(OSError) as raised:
        list(source.read(listing.keys, listing.locations))
    assert raised.value.errno == errno.EIO


class Throttled:
    """A file system, or a file in it, every second read of which a store throttles in the way of S3."""

    refused = 0

    def __init__(self, inner):
        self.inner, self.reads = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def open_input_file(self, path):
        return Throttled(self.inner.open_input_file(path))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inner.close()

    def _throttle(self):
        self.reads += 1
        if self.reads % 2:
            Throttled.refused += 1
            raise OSError(f"AWS Error UNKNOWN (HTTP status 503): {object_stores.THROTTLED_READ_ERROR}")

    def read_at(self, *arguments):
        self._throttle()
        return self.inner.read_at(*arguments)

    def read(self, *arguments):
        self._throttle()
        return self.inner.read(*arguments)


def test_throttled_reads_of_a_bucket_are_repeated(layout, tmp_path, monkeypatch):
    folder, settings = layout
    local = open_source(ImagesConfig(path=str(folder), **settings))
    expected = local.listing()
    monkeypatch.setattr(object_stores.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Throttled, "refused", 0)
    store = Throttled(LocalFileSystem())
    monkeypatch.setattr(paths, "resolve_in_bucket", lambda uri: (store, uri.replace("s3:/", str(tmp_path))))
    source = open_source(ImagesConfig(path="s3://set", **settings))
    found = source.listing()
    assert found.digest == expected.digest
    images = source.read(found.keys, found.locations)
    assert contents(found, images) == contents(expected, local.read(expected.keys, expected.locations))
    assert Throttled.refused > 0


@pytest.mark.parametrize(
    "storage_kind", [pytest.param("file", marks=pytest.mark.slow), "s3", pytest.param("gs", marks=pytest.mark.slow)]
)
def test_buckets_and_uris_give_the_same_images_as_a_disk(layout, storage_kind, request, tmp_path):
    folder, settings = layout
    if storage_kind == "file":
        uri = folder.as_uri()
    elif storage_kind == "s3":
        uri = f"{request.getfixturevalue('s3_bucket')}/deep/set"
        filesystem, inner = storage.resolve(uri)
        copy_files(str(folder), inner, LocalFileSystem(), filesystem)
    else:
        bucket, uri_of = request.getfixturevalue("gs_bucket")
        shutil.copytree(folder, bucket / "deep" / "set")
        uri = uri_of("deep/set")
    here, there = (open_source(ImagesConfig(path=path, **settings)) for path in (str(folder), uri))
    expected, found = here.listing(), there.listing()
    assert type(here) is type(there) and found.digest == expected.digest
    images = there.read(found.keys, found.locations)
    assert contents(found, images) == contents(expected, here.read(expected.keys, expected.locations))


def test_the_error_names_a_missing_path_in_a_bucket(s3_bucket):
    with pytest.raises(FileNotFoundError, match=f"images.path: found nothing at {s3_bucket}/none, expected"):
        open_source(ImagesConfig(path=f"{s3_bucket}/none"))


def test_a_uri_with_two_slashes_or_one_at_its_end_means_the_same(s3_bucket, tmp_path):
    LAYOUTS["parquet"](tmp_path / "set", pictures(COUNT))
    filesystem, inner = storage.resolve(f"{s3_bucket}/deep/set")
    copy_files(str(tmp_path / "set"), inner, LocalFileSystem(), filesystem)
    expected = open_source(ImagesConfig(path=f"{s3_bucket}/deep/set")).listing().digest
    for uri in ("//deep/set", "/deep//set", "/deep/set/", "/deep/set//"):
        assert open_source(ImagesConfig(path=s3_bucket + uri)).listing().digest == expected
    assert len(open_source(ImagesConfig(path=f"{s3_bucket}/deep//set/part-0.parquet/")).listing()) == COUNT // 2
