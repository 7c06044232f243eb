"""Images to be scored: their digest, by lengths of files or else by the content of some, and their report's name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, square, write
from PIL import Image

from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.artifacts import digest_of
from pipelines.config.recipe import ImagesConfig
from pipelines.evaluate_images import images_digest, images_report_folder, reference_recipe
from pipelines.images.ad_hoc_recipe import image_recipe, images_name
from pipelines.images.open import open_source
from pipelines.scoring.reports.report_files import save_report


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


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("samples/cfg-1.5", "cfg-1.5"),
        ("samples/cfg-1.25/", "cfg-1.25"),
        ("samples.npz", "samples"),
        ("v1.2.tar", "v1.2"),
        ("a/metadata.csv", "metadata"),
        (".", "here.now"),
        ("..", "over"),
        ("sub/..", "here.now"),
        ("/", "images"),
        ("s3://bucket/some.samples/?endpoint_override=http://127.0.0.1:9/x.y", "some.samples"),
        ("s3://bucket/..", "images"),
    ],
)
def test_a_report_is_named_after_the_folder_or_file_of_the_images(tmp_path, monkeypatch, path, name):
    (tmp_path / "over" / "here.now").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "over" / "here.now")
    assert images_name(path) == image_recipe(path, "out").name == name
    monkeypatch.setattr("pipelines.evaluate_images.reference_overrides", lambda reference: [])
    assert reference_recipe("reference.npz", path).output == f"outputs/{name}"


def test_a_report_under_the_name_of_earlier_releases_is_found(tmp_path):
    protocol = EvaluationProtocol(decoder="d", extractor="e", extractor_sha256="s", reference_digest="r")

    def folder_of(path, digest):
        return images_report_folder(str(tmp_path), "id", path, digest)

    def save(folder, digest):
        save_report(EvaluationReport(protocol=protocol, checkpoint="c", checkpoint_digest=digest, metrics={}), folder)

    save(earlier := str(tmp_path / "id" / "cfg-1"), "a" * 64)
    save(str(tmp_path), "b" * 64)  # "..", by which a report once lay in another folder
    assert folder_of("samples/cfg-1.5", "a" * 64) == earlier
    assert folder_of("samples/cfg-1.25", "b" * 64) == folder_of("samples/cfg-1.25", "c" * 64)
    assert folder_of("samples/cfg-1.25", "b" * 64) == str(tmp_path / "id" / "cfg-1.25")
    assert folder_of("..", "b" * 64).startswith(str(tmp_path / "id"))
    save(later := str(tmp_path / "id" / "cfg-1.5"), "a" * 64)
    assert folder_of("samples/cfg-1.5", "a" * 64) == later
