"""The recipe of the benchmark of jobs, the images that it makes, and its limit of time."""

import io
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gpu_jobs import Watch, start_of
from PIL import Image
from run_gpu_jobs import LIMIT_SECONDS, PARTS, RECIPE, SMALL, write_jpegs

from pipelines.config.reader import load_recipe


def test_the_recipe_and_its_rehearsal_are_valid():
    config, small = load_recipe(RECIPE), load_recipe(RECIPE, tuple(SMALL))
    assert (config.encode.gpus_per_worker, small.encode.gpus_per_worker) == (1, 0)
    assert config.encode.flip and config.encode.dtype == config.train.dtype == "bfloat16" and config.train.compile
    assert config.encode.shard_rows % config.encode.batch_size == 0  # no batch is padded


def test_all_parts_fit_into_the_limit():
    assert sum(seconds for _, seconds in PARTS.values()) <= LIMIT_SECONDS


def test_images_become_jpeg_files_in_folders_of_their_classes(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 100, 50)).save(file, "PNG")
    rows = [{"image": {"bytes": file.getvalue(), "path": None}, "label": label} for label in (3, 0, 3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "i.parquet")
    write_jpegs(tmp_path / "i.parquet", tmp_path / "images", 32)
    names = sorted(path.relative_to(tmp_path / "images").as_posix() for path in tmp_path.glob("images/*/*"))
    assert names == ["0/000001.jpg", "3/000000.jpg", "3/000002.jpg"]
    with Image.open(tmp_path / "images" / names[0]) as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))
        assert image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) == pytest.approx((200, 100, 50), abs=8)


def test_a_training_starts_when_its_first_step_is_done_and_not_at_its_first_report():
    watch = Watch(started=10.0, begun={"train": 25.0}, first={"train": (40.0, 51)})
    config = load_recipe(RECIPE)
    run = SimpleNamespace(config=config, watch=watch, rates=lambda stage: [100.0, 256 * 10.0, 256 * 20.0])
    figures = [start_of(run, "train", from_command=each) for each in (True, False)]
    assert [figure.value for figure in figures] == [pytest.approx(25.0), pytest.approx(10.0)]  # 50 steps take 5 s
    assert figures[0].what == "train: from the command to the first step"
    assert start_of(run, "encode", from_command=True).note == "not reached"
