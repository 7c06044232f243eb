"""Saved samples can be read as images again, by raydit and by other tools."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from buckets import s3_bucket, s3_server  # noqa: F401
from PIL import Image

from cluster import storage
from evaluation.protocol import EvaluationProtocol
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source
from pipelines.scoring.samples.saved_samples import SavedSamples
from pipelines.scoring.score_checkpoint import CheckpointEvaluation, prepare_saved_folders
from raydit.errors import AlreadyExists, InvalidInput

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
LABELS = np.array([1, 0, 1, 2, 0, 1])
NAMES = ("zebra", "a/b", "")
SOURCE = {"checkpoint": "a", "seed": 0, "shard_rows": 4}


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


@pytest.mark.parametrize("format", ["parquet", "png"])
def test_the_record_of_the_source_is_no_image(tmp_path, format):
    """Neither for raydit nor for pyarrow, which reads the folder above."""
    write(tmp_path, format).write_source(SOURCE)
    assert len(open_source(ImagesConfig(path=str(tmp_path))).listing()) == 6
    if format == "parquet":
        assert pq.read_table(tmp_path).num_rows == 6


@pytest.mark.parametrize("format", ["parquet", "png"])
def test_a_folder_takes_the_samples_of_one_source_only(tmp_path, format):
    saved = write(tmp_path / "earlier", format)
    with pytest.raises(AlreadyExists, match="found files of unknown origin in .* Name another folder, or delete this"):
        saved.refuse_other_samples(SOURCE)  # as earlier versions left it
    saved.write_source(SOURCE)
    saved.refuse_other_samples(dict(SOURCE))  # the same command, resumed
    with pytest.raises(AlreadyExists, match="found samples with another checkpoint, seed in"):
        saved.refuse_other_samples({**SOURCE, "checkpoint": "b", "seed": 1})
    storage.write_atomically(str(tmp_path / "earlier" / ".records" / "source.json"), b"no JSON")
    with pytest.raises(AlreadyExists, match="found files of unknown origin"):
        saved.refuse_other_samples(SOURCE)


def test_a_folder_without_samples_takes_those_of_any_source(tmp_path):
    saved = SavedSamples(str(tmp_path / "saved"))
    saved.refuse_other_samples(SOURCE)
    saved.write_source(SOURCE)  # and then it is interrupted, before the first image
    saved.refuse_other_samples({**SOURCE, "seed": 1})


def evaluation_of(checkpoint, saved, shard_rows=4, **protocol):
    """The evaluation of a checkpoint whose samples go to a folder."""
    scored = {"extractor": "e", "extractor_sha256": "s", "reference_digest": "r"}
    opened = SimpleNamespace(digest=checkpoint, origin=f"{checkpoint}/step_0000002", name="step_0000002")
    settings = SimpleNamespace(evaluate=EvaluateConfig(shard_rows=shard_rows))
    return CheckpointEvaluation(opened, EvaluationProtocol(**{"decoder": "d", **scored, **protocol}), settings, saved)


def test_samples_of_other_checkpoints_or_settings_are_not_mixed(tmp_path):
    saved = SavedSamples(str(tmp_path / "saved"))
    prepare_saved_folders([evaluation_of("a", saved)])
    write(tmp_path / "saved", "parquet")
    prepare_saved_folders([evaluation_of("a", saved)])
    prepare_saved_folders([evaluation_of("a", saved, extractor="other", reference_digest="other")])
    others = {
        "checkpoint": evaluation_of("b", saved),
        "seed": evaluation_of("a", saved, seed=1),
        "sampling_steps": evaluation_of("a", saved, sampling_steps=3),
        "num_samples": evaluation_of("a", saved, num_samples=11),
        "shard_rows": evaluation_of("a", saved, shard_rows=3),
        "save_format": evaluation_of("a", replace(saved, format="png")),
    }
    for name, other in others.items():
        new = evaluation_of("a", SavedSamples(str(tmp_path / "new")))
        with pytest.raises(AlreadyExists, match=f"samples with another {name} in"):
            prepare_saved_folders([new, other])
        assert not (tmp_path / "new").exists()  # nothing is written before all folders are looked at


def test_two_checkpoints_of_one_name_cannot_share_a_folder(tmp_path):
    saved = SavedSamples(str(tmp_path / "saved"))
    with pytest.raises(InvalidInput, match="found two checkpoints named step_0000002"):
        prepare_saved_folders([evaluation_of("a", saved), evaluation_of("b", saved)])
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("format", ["parquet", "png"])
def test_samples_that_are_all_in_the_folder_need_not_be_drawn_again(tmp_path, format):
    saved = SavedSamples(str(tmp_path / "saved"), format, NAMES)
    evaluation = evaluation_of("a", saved, num_samples=10, shard_rows=5)
    assert evaluation.lacks_saved_samples()
    prepare_saved_folders([evaluation])
    write(tmp_path / "saved", format)  # two shards, as 10 samples are
    assert not evaluation.lacks_saved_samples()
    assert evaluation_of("b", saved, num_samples=10, shard_rows=5).lacks_saved_samples()
    storage.remove_file(saved.file(1))
    assert evaluation.lacks_saved_samples()
    assert not replace(evaluation, saved=None).lacks_saved_samples()
