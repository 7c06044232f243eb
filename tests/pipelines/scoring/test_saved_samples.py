"""Saved samples can be read as images again, by raydit and by other tools."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from buckets import s3_bucket, s3_server  # noqa: F401
from PIL import Image

from cluster import storage
from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.scoring.saved_samples import SavedSamples

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
LABELS = np.array([1, 0, 1, 2, 0, 1])
NAMES = ("zebra", "a/b", "")


def write(folder, format, class_names=NAMES):
    saved = SavedSamples(str(folder), format, class_names)
    for shard, part in enumerate((range(4), range(4, 6))):
        saved.write(saved.file(shard), IMAGES[list(part)], LABELS[list(part)], part)
    return saved


@pytest.mark.parametrize("format", ["parquet", "png"])
def test_saved_samples_are_a_source_of_the_same_images_and_labels(tmp_path, format):
    write(tmp_path, format)
    source = open_source(ImagesConfig(path=str(tmp_path)))
    listing = source.listing()
    pixels = [np.asarray(image) for image in source.read(listing.keys)]
    found = {image.tobytes(): int(label) for image, label in zip(pixels, listing.labels, strict=True)}
    assert found == {image.tobytes(): int(label) for image, label in zip(IMAGES, LABELS, strict=True)}
    assert len(listing.class_names) == 3


def test_parquet_files_open_without_raydit(tmp_path):
    write(tmp_path, "parquet")
    table = pq.read_table(tmp_path)
    assert table.column("index").to_pylist() == list(range(6))
    assert table.column("label").to_pylist() == LABELS.tolist()
    decoded = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table.column("image").to_pylist()]
    assert np.array_equal(decoded, IMAGES)


def test_png_files_lie_in_class_folders_whatever_characters_a_name_has(tmp_path):
    write(tmp_path, "png")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [
        "0000-zebra/0000001.png",
        "0000-zebra/0000004.png",
        "0001-a-b/0000000.png",
        "0001-a-b/0000002.png",
        "0001-a-b/0000005.png",
        "0002/0000003.png",
    ]


def test_without_classes_there_are_no_class_folders(tmp_path):
    write(tmp_path, "png", class_names=())
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{index:07d}.png" for index in range(6)]


def test_a_shard_is_finished_once_its_file_exists(tmp_path):
    for format in ("parquet", "png"):
        saved = write(tmp_path / format, format)
        assert all(storage.exists(saved.file(shard)) for shard in (0, 1)) and not storage.exists(saved.file(2))


def test_samples_can_be_saved_in_a_bucket(s3_bucket):  # noqa: F811
    write(f"{s3_bucket}/saved", "parquet")
    assert len(open_source(ImagesConfig(path=f"{s3_bucket}/saved")).listing()) == 6
