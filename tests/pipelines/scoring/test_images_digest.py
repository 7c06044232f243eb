"""The digest of images to be scored: by lengths of files, and by the content of some if all lengths are equal."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pictures import encoded, square, write
from PIL import Image

from pipelines.artifacts import digest_of
from pipelines.config.recipe import ImagesConfig
from pipelines.evaluate_images import images_digest
from pipelines.images.open import open_source


def digests(path):
    """The digest of a source, and what it was before files were read."""
    images = ImagesConfig(path=str(path), split="all", size=16)
    source = open_source(images)
    listing = source.listing()
    return images_digest(source, listing, images), digest_of([listing.digest, images.size, images.crop])


def write_bitmaps(folder, seed, count=20):
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index:03d}.bmp")
    return folder


def test_uncompressed_images_of_one_size_are_told_apart(tmp_path):
    (first, before), (second, same) = (digests(write_bitmaps(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    assert before == same and len({first, second, before}) == 3
    (tmp_path / "a" / "005.bmp").rename(tmp_path / "moved.bmp")
    (tmp_path / "moved.bmp").rename(tmp_path / "a" / "005.bmp")
    assert digests(tmp_path / "a")[0] == first  # the same content under the same names
    for folder in ("a", "b"):
        (tmp_path / folder / "metadata.csv").write_text("file_name,label\n000.bmp,0\n001.bmp,1\n")
    assert digests(tmp_path / "a")[0] != digests(tmp_path / "b")[0]


def test_other_images_keep_the_digest_that_they_had(tmp_path):
    for index, value in enumerate((5, 60)):
        write(tmp_path / "lengths" / f"{index}.png", encoded(square(value)) + b" " * index)
    cells = [{"bytes": encoded(square(value))} for value in (5, 6)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    for path in (tmp_path / "lengths", tmp_path / "x.parquet", write_bitmaps(tmp_path / "one", 0, count=1)):
        found, before = digests(path)
        assert found == before
