"""Files of images: any row is read from any file, in memory that does not grow with the number of images."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import BROKEN, tiny_recipe
from tiny_images import image_rows

from pipelines.images.open import open_source
from pipelines.training.data import image_files
from pipelines.training.data.image_files import ImageFile, describe_unusable, write_image_file
from raydit.errors import InvalidInput, StorageFailed

ROOT = Path(__file__).resolve().parents[4]


def test_rows_are_those_of_all_files_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_OPEN_FILES", 2)
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    rows = image_rows(tmp_path, images[:2], images[2:2], images[2:3], images[3:], size=4)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(9), 3))
    assert len(rows) == 9 and np.array_equal(rows.read(order), images[order])
    assert rows.read([]).shape == (0, 4, 4, 3)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    rows = image_rows(tmp_path, np.zeros((2, 4, 4, 3), np.uint8), size=4)
    (tmp_path / "0.u8").write_bytes(b"\0" * 90)
    rows.read([0])
    with pytest.raises(StorageFailed, match="0.u8 ends before the image at byte 48"):
        rows.read([1])


@pytest.fixture
def some_broken(tmp_path):
    """The tiny images, a path for a file of them, and a function that writes it."""
    images = tiny_recipe(tmp_path).images
    keys, uri = open_source(images).listing().keys, str(tmp_path / "0.u8")
    return images, Path(uri), lambda begun=False: write_image_file(images, uri, keys, None, begun)


def test_images_that_cannot_be_used_are_counted_with_an_example(some_broken, tmp_path):
    images, file, write = some_broken
    written = write()
    assert (written.rows, written.unusable, len(written.errors)) == (36, 1, 1) and write() == written
    line = describe_unusable([ImageFile("1.u8", 4), written], "training", 0.05, "training")
    assert line.startswith(f"1 of 41 training images cannot be used and are left out, such as {BROKEN} (Unidentified")
    assert (
        describe_unusable([ImageFile("1.u8", 4)], "training", 0.0, "") == describe_unusable([], "held-out", 0, "") == ""
    )
    with pytest.raises(InvalidInput, match=r"1 of 37 held-out .*at most 0 \(encode.max_quarantined = 0"):
        describe_unusable([written], "held-out", 0.0, "training")
    errors = tuple((f"{number}.png", "broken") for number in range(3))
    for rows, least in ((0, 1), (1, 2)):
        with pytest.raises(InvalidInput, match=rf"3 of {3 + rows} held-out images .* such as 0.png \(broken\)"):
            describe_unusable([ImageFile("1.u8", rows, 3, errors)], "held-out", 1.0, "training", least)


def test_images_that_become_readable_are_used_unless_training_has_begun_without_them(some_broken, tmp_path):
    images, file, write = some_broken
    write()
    shutil.copy(tmp_path / "images" / "ring" / "000.png", tmp_path / "images" / BROKEN)
    before = file.read_bytes()
    begun = write(begun=True)
    assert file.read_bytes() == before and (begun.rows, begun.unusable) == (36, 1)
    with pytest.raises(InvalidInput, match="0 of 37 training .* and 1 when training began.* Remove FOLDER and run"):
        describe_unusable([begun], "training", 0.05, "FOLDER")
    assert write().rows == 37 and file.stat().st_size == 37 * 16**2 * 3


PEAK_AFTER_AN_EPOCH = """
import resource, sys, tempfile
from pathlib import Path
import numpy as np
from tiny_images import image_rows
from pipelines.training.data.batches import image_batches, prefetch
from pipelines.training.data.order import WorkerShare
count = int(sys.argv[1])
block = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
with tempfile.TemporaryDirectory() as folder:
    rows = image_rows(Path(folder), *[block] * (count // 1000), size=32)
    share = WorkerShare(0, 1, 250)
    draws = {"latent_shape": (4, 8, 8), "seed": 0, "random": "counter"}
    batches = prefetch(image_batches(rows, share=share, first_batch=0, **draws))
    for _ in range(count // 250):
        next(batches)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_as_large_for_100000_images_as_for_10000():
    def peak(count):
        path = f"{ROOT}:{ROOT / 'tests'}"
        command = [sys.executable, "-c", PEAK_AFTER_AN_EPOCH, str(count)]
        return int(subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, check=True).stdout)

    assert peak(100_000) < 1.05 * peak(10_000)
