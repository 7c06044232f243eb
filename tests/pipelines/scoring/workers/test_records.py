"""Records of shards are read back completely and in order: no padding, and no record of another shard."""

import io
import zipfile

import numpy as np
import pytest

from cluster import storage
from evaluation.protocol import EvaluationProtocol, shard_ranges
from pipelines.images.listing import Listing
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.scoring.workers.records import load_features, load_preview_images, read_arrays
from pipelines.scoring.workers.shards import find_unfinished, make_shards, split_listing

N, DIM = 11, 3
FEATURES = np.arange(N * DIM, dtype=np.float32).reshape(N, DIM)


def write(shard, indices, **more):
    indices = list(indices)
    record = {"indices": np.array(indices), "labels": np.array(indices) % 2, "features": FEATURES[indices]}
    images = np.repeat(np.array(indices, np.uint8), 12).reshape(-1, 2, 2, 3)
    seconds = {"sampling_seconds": np.array(0.5), "extraction_seconds": np.array(0.25)}
    put(shard, **{**record, "images": images, **seconds, **more})


def put(shard, **arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_atomically(shard.file, buffer.getvalue())


@pytest.fixture(params=["disk", "bucket"])
def shards(request, tmp_path):
    """Three finished shards, of 4, 4 and 3 samples."""
    folder = str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3_bucket")
    shards = make_shards(storage.join(folder, "shards"), shard_ranges(N, 4))
    for shard in shards:
        write(shard, shard.images)
    return shards


def test_records_are_joined_in_the_order_of_the_samples(shards):
    loaded = load_features(shards)
    features, logits, spatial = loaded.features
    assert np.array_equal(features, FEATURES) and features.dtype == np.float32
    assert logits is spatial is None
    assert loaded.labels.tolist() == [index % 2 for index in range(N)]
    assert load_preview_images(shards)[:, 0, 0, 0].tolist() == list(range(N))
    assert loaded.timings == {"workers_sampling_seconds": 1.5, "workers_extraction_seconds": 0.75}


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (range(8, 12 - 2), "found 2 images, expected 3"),
        ([8, 9, 10, 10], "found 4 images, expected 3"),  # the padding of a last batch
        ([8, 9, 9], "found samples 8 to 9, expected 8 to 10"),
        ([0, 1, 2], "found samples 0 to 2, expected 8 to 10"),  # another shard's
    ],
)
def test_a_record_of_other_samples_is_refused(shards, indices, message):
    write(shards[2], indices)
    with pytest.raises(ValueError, match=message + ".*Delete it and run again"):
        load_features(shards)


def test_an_unreadable_image_is_refused_instead_of_left_out(tmp_path):
    listing = Listing([f"k{index}" for index in range(4)], np.zeros(4, np.int32), np.zeros(4, np.int64), ())
    (shard,) = make_shards(str(tmp_path / "shards"), [listing])
    put(shard, features=FEATURES[:3], unreadable=np.array(["k2"]))
    with pytest.raises(ValueError, match="1 image cannot be read, such as k2, expected every image to be scored"):
        load_features([shard])


def test_images_that_could_not_be_read_are_read_again_by_the_same_command(tmp_path):
    keys = [f"k{index}" for index in range(9)]
    listing = Listing(keys, np.zeros(9, np.int32), np.zeros(9, np.int64), ())
    shards = make_shards(str(tmp_path / "shards"), split_listing(listing, 3))
    for shard, missing in zip(shards, (["k1"], [], ["k6", "k8"]), strict=True):
        put(shard, features=FEATURES[: 3 - len(missing)], unreadable=np.array(missing, dtype=str))
    with pytest.raises(ValueError, match="3 images cannot be read, such as k1"):
        load_features(shards)
    assert find_unfinished(shards) == [shards[0], shards[2]]


def test_unfinished_shards_are_found_by_one_listing_of_each_folder(s3_bucket, s3_app):
    saved = SavedSamples(f"{s3_bucket}/saved")
    shards = make_shards(f"{s3_bucket}/shards", shard_ranges(120, 4), saved=saved)
    assert find_unfinished(shards) == shards
    for shard in shards[:3]:
        put(shard, indices=np.array(shard.images))
    for shard in shards[1:4]:
        storage.write_atomically(shard.saved, b"images")
    before = s3_app.count
    assert find_unfinished(shards) == [shards[0], *shards[3:]]
    assert s3_app.count - before <= 2


@pytest.mark.parametrize(("labels", "counts"), [("balanced", [334, 333, 333]), ("random", None)])
def test_labels_do_not_depend_on_the_shards(labels, counts):
    """Balanced labels differ in number by at most one; random ones are drawn evenly."""
    from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler

    sampler = CheckpointSampler.__new__(CheckpointSampler)
    sampler.protocol = EvaluationProtocol(
        num_samples=1000, labels=labels, decoder="", extractor="", extractor_sha256="", reference_digest=""
    )
    sampler.num_classes = 3
    drawn = {
        rows: np.concatenate([sampler.labels(part) for part in shard_ranges(1000, rows)]) for rows in (7, 100, 1000)
    }
    assert all(np.array_equal(drawn[7], other) for other in drawn.values())
    found = np.bincount(drawn[7], minlength=3).tolist()
    assert sum(found) == 1000
    if counts:
        assert found == counts
    else:
        assert found != [334, 333, 333] and all(abs(count - 1000 / 3) < 4 * (1000 * 2 / 9) ** 0.5 for count in found)


def saved_arrays(**arrays) -> io.BytesIO:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return file


ARRAYS = {
    "features": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
    "transposed": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "images": np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3),
    "keys": np.array(["a", "\u00e9\u00e9"]),
    "nothing": np.array([]),
    "no_keys": np.array([], dtype=str),
    "big_endian": np.arange(3, dtype=">i4"),
    "seconds": np.float64(1.5),
}


def test_arrays_are_read_as_numpy_reads_them():
    found, expected = read_arrays(saved_arrays(**ARRAYS)), np.load(saved_arrays(**ARRAYS), allow_pickle=False)
    assert list(found) == expected.files == list(ARRAYS)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and array.flags.writeable
        np.testing.assert_array_equal(array, expected[name])


def test_arrays_can_be_left_out():
    assert list(read_arrays(saved_arrays(**ARRAYS), without=("images", "keys", "other"))) == [
        name for name in ARRAYS if name not in ("images", "keys")
    ]


def test_nothing_is_unpickled():
    with pytest.raises(ValueError, match="array of objects"):
        read_arrays(saved_arrays(features=np.array([{}], dtype=object)))


def test_a_truncated_file_is_refused():
    with pytest.raises(zipfile.BadZipFile):
        read_arrays(io.BytesIO(saved_arrays(**ARRAYS).getvalue()[:-30]))


def test_an_array_in_a_later_format_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members, members.open("features.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros(3), version=(2, 0))
    with pytest.raises(ValueError, match=r"format \(2, 0\)"):
        read_arrays(file)
