"""What was computed is read back once, whole, in order: never padding, never another shard's."""

import io

import numpy as np
import pytest

from cluster import storage
from evaluation.protocol import EvaluationProtocol, shard_ranges
from pipelines.images.listing import Listing
from pipelines.scoring.actors import SECONDS, load_features, load_preview_images, make_shards, unfinished
from pipelines.scoring.saved_samples import KeptImages

N, DIM = 11, 3
FEATURES = np.arange(N * DIM, dtype=np.float32).reshape(N, DIM)


def write(shard, indices, **more):
    indices = list(indices)
    record = {"indices": np.array(indices), "labels": np.array(indices) % 2, "features": FEATURES[indices]}
    images = np.repeat(np.array(indices, np.uint8), 12).reshape(-1, 2, 2, 3)
    seconds = {SECONDS[0]: np.array(0.5), SECONDS[1]: np.array(0.25)}
    put(shard, **{**record, "images": images, **seconds, **more})


def put(shard, **arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_atomically(shard.file, buffer.getvalue())


@pytest.fixture(params=["disk", "bucket"])
def shards(request, tmp_path):
    """Three finished ones, of 4, 4 and 3 samples."""
    folder = str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3_bucket")
    shards = make_shards(storage.join(folder, "shards"), shard_ranges(N, 4))
    for shard in shards:
        write(shard, shard.images)
    return shards


def test_records_are_joined_in_the_order_of_the_samples(shards):
    found, seconds = load_features(shards)
    assert set(found) == {"indices", "labels", "features"}
    assert np.array_equal(found["features"], FEATURES) and found["features"].dtype == np.float32
    assert found["indices"].tolist() == list(range(N))
    assert load_preview_images(shards)[:, 0, 0, 0].tolist() == list(range(N))
    assert seconds == {"workers_sampling_seconds": 1.5, "workers_extraction_seconds": 0.75}


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


def test_an_image_that_cannot_be_read_is_no_image_less_to_score(tmp_path):
    listing = Listing([f"k{index}" for index in range(4)], np.zeros(4, np.int32), np.zeros(4, np.int64), ())
    (shard,) = make_shards(str(tmp_path / "shards"), [listing])
    put(shard, features=FEATURES[:3], unreadable=np.array(["k2"]))
    with pytest.raises(ValueError, match="1 images cannot be read, such as k2; expected every image to be scored"):
        load_features([shard])


def test_what_is_left_to_do_is_known_from_one_listing_of_each_folder(s3_bucket, s3_app):
    kept = KeptImages(f"{s3_bucket}/kept")
    shards = make_shards(f"{s3_bucket}/shards", shard_ranges(120, 4), kept)
    assert unfinished(shards) == shards
    for shard in shards[:3]:
        put(shard, indices=np.array(shard.images))
    for shard in shards[1:4]:
        storage.write_atomically(shard.kept, b"images")
    before = s3_app.count
    assert unfinished(shards) == [shards[0], *shards[3:]]
    assert s3_app.count - before <= 2


@pytest.mark.parametrize(("labels", "counts"), [("balanced", [334, 333, 333]), ("random", None)])
def test_labels_of_all_shards_are_counted(labels, counts):
    """Balanced to within one whatever the shards; random ones are drawn evenly."""
    from pipelines.scoring.checkpoint_sampler import Sampler

    sampler = Sampler.__new__(Sampler)
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
