"""ADM's .npz files as a source of images, by whatever program they were written."""

import numpy as np
import pytest
from buckets import s3_bucket, s3_server  # noqa: F401
from pyarrow.fs import LocalFileSystem, copy_files

from cluster import storage
from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.sample import write_adm
from pipelines.scoring.workers.records import ShardResult
from raydit.errors import InvalidInput

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


def test_labels_of_every_type_of_whole_numbers_are_read(tmp_path):
    for dtype in (np.uint8, ">i8", np.uint64, np.float16, np.float64):
        np.savez(tmp_path / "samples.npz", IMAGES, LABELS.astype(dtype)[:, None])
        for reading in (None, "earlier"):
            listing = open_source(ImagesConfig(path=str(tmp_path / "samples.npz"), reading=reading)).listing()
            assert (listing.class_names, listing.labels.tolist()) == (("0", "1", "2"), LABELS.tolist())
            assert listing.labels.dtype == np.int32
    np.savez(tmp_path / "samples.npz", IMAGES, LABELS > 1)
    assert source(tmp_path / "samples.npz").listing().labels.tolist() == [1, 0, 0, 1, 1]


def test_given_class_names_are_those_of_the_labels(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES, LABELS)
    names = ("ant", "bee", "cat", "dog")
    listing = open_source(ImagesConfig(path=str(tmp_path / "samples.npz"), class_names=names)).listing()
    assert (listing.class_names, listing.labels.tolist()) == (names, LABELS.tolist())


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        (None, ("x", "y"), "images.class_names: found x, y for images without labels in .*samples.npz"),
        ([0, 5, 9, 1, 1], ("x", "y"), r"samples.npz, arr_1: found the label 5, expected integers from 0 to 1"),
        ([0, -1, 0, 0, 0], (), "found the label -1"),
        ([0.0, 1.7, 2.0, 0.0, 0.0], (), "found the label 1.7 of type double"),
        ([0, np.nan, 1, 1, 1], (), "found the label nan of type double"),
        (np.eye(5, 3, dtype=int), (), r"found labels of int64 \(5, 3\) in arr_1, expected 5 integers"),
        (["a", "b", "c", "d", "e"], (), "found labels of <U1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, class_names, message):
    arrays = {} if labels is None else {"arr_1": np.array(labels)}
    np.savez(tmp_path / "samples.npz", arr_0=IMAGES, **arrays)
    with pytest.raises(InvalidInput, match=message):
        open_source(ImagesConfig(path=str(tmp_path / "samples.npz"), class_names=class_names)).listing()


def test_older_outputs_keep_the_labels_that_they_were_made_with(tmp_path):
    path = tmp_path / "samples.npz"
    for arrays, labels in (({}, [0] * 5), ({"arr_1": np.eye(5, 3)}, [0] * 5), ({"arr_1": LABELS + 0.5}, LABELS)):
        np.savez(path, arr_0=IMAGES, **arrays)
        listing = open_source(ImagesConfig(path=str(path), class_names=("x", "y", "z"), reading="earlier")).listing()
        assert (listing.class_names, listing.labels.tolist()) == (("x", "y", "z"), list(labels))
    np.savez(path, arr_0=IMAGES, arr_1=np.full(5, np.nan))
    with pytest.raises(InvalidInput, match="found labels of float64"):
        open_source(ImagesConfig(path=str(path), reading="earlier")).listing()
