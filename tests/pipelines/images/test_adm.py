"""ADM's .npz files as a source of images, by whatever program they were written."""

import numpy as np
import pytest
from buckets import s3_bucket, s3_server  # noqa: F401
from pyarrow.fs import LocalFileSystem, copy_files

from cluster import storage
from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.sample import write_adm
from pipelines.scoring.records import ShardResult

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 2, 2])


def source(path):
    return open_source(ImagesConfig(path=str(path)))


def read(source, positions):
    keys = source.listing().keys
    return np.stack([np.asarray(image) for image in source.read([keys[position] for position in positions])])


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_numpys_files_are_read(tmp_path, write):
    write(tmp_path / "samples.npz", IMAGES, LABELS)
    found = source(tmp_path / "samples.npz")
    listing = found.listing()
    assert (len(listing), listing.class_names) == (5, ("0", "1", "2"))
    assert listing.labels.tolist() == LABELS.tolist()
    assert np.array_equal(read(found, [4, 0, 2]), IMAGES[[4, 0, 2]])


def test_our_own_sample_files_are_read(tmp_path):
    write_adm(tmp_path / "samples.npz", [ShardResult(images=IMAGES, labels=LABELS)], 5)
    assert np.array_equal(read(source(tmp_path / "samples.npz"), range(5)), IMAGES)


def test_a_file_without_labels_has_no_classes(tmp_path):
    np.savez(tmp_path / "samples.npz", mu=np.zeros(3), arr_0=IMAGES)
    listing = source(tmp_path / "samples.npz").listing()
    assert (listing.class_names, listing.labels.tolist()) == ((), [0] * 5)


def test_the_digest_changes_with_any_pixel(tmp_path):
    changed = IMAGES.copy()
    changed[3, 2, 1, 0] ^= 1
    digests = set()
    for name, images in {"a": IMAGES, "b": IMAGES, "c": changed}.items():
        np.savez(tmp_path / f"{name}.npz", images)
        digests.add(source(tmp_path / f"{name}.npz").listing().digest)
    assert len(digests) == 2


def test_a_file_in_a_bucket_is_read_by_ranges(tmp_path, s3_bucket):  # noqa: F811
    np.savez(tmp_path / "samples.npz", IMAGES, LABELS)
    filesystem, inner = storage.resolve(s3_bucket)
    copy_files(str(tmp_path / "samples.npz"), f"{inner}/samples.npz", LocalFileSystem(), filesystem)
    assert np.array_equal(read(source(f"{s3_bucket}/samples.npz"), [1, 3]), IMAGES[[1, 3]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weights": np.zeros(3)}, "found weights.npy in .*, expected images in arr_0"),
        ({"arr_0": IMAGES / 255}, r"found arr_0 of float64 \(5, 6, 8, 3\) in .*expected uint8 \(N, H, W, 3\)"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"found arr_0 of uint8 \(5, 3, 6, 8\)"),
    ],
)
def test_files_without_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        source(tmp_path / "other.npz").listing()
