"""Pictures of a report."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.reference import ReferenceStatistics
from pipelines.evaluate import evaluate
from pipelines.images.grids import class_grid
from pipelines.scoring.reports.report_pictures import Neighbours, report_pictures
from pipelines.scoring.workers.records import MAX_PREVIEW_IMAGES

UNKNOWN = ReferenceStatistics(n=9, mu=np.zeros(2), sigma=np.eye(2), extractor="efficientnet-lite0", extractor_sha256="")
BLACK = np.zeros((64, 8, 8, 3), np.uint8)


def test_the_first_of_many_samples_are_shown_by_their_own_labels(tmp_path):
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (12, 8, 8, 3)).astype(np.uint8), np.arange(30) % 3
    neighbours = Neighbours(UNKNOWN, tiny_output(tmp_path).images)
    pictures = report_pictures(images, labels, np.zeros((30, 2)), ("a", "b", "c"), neighbours)
    assert pictures.keys() == {"samples", "classes"}
    shown = Image.open(io.BytesIO(pictures["classes"]))
    assert np.array_equal(np.asarray(shown), np.asarray(class_grid(images, labels[:12], ("a", "b", "c"))))


def test_neighbours_are_named_by_the_numbers_of_the_images_in_their_source(tmp_path, monkeypatch):
    rows = []

    def grid(given):
        rows.extend(given)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("pipelines.scoring.reports.report_pictures.labelled_grid", grid)
    monkeypatch.setattr("pipelines.images.preprocess.read_cropped", lambda _, keys: (BLACK[: len(keys)], keys, None))
    images = tiny_output(tmp_path).images
    known = {"features": np.zeros((5, 2)), "keys": np.array(list("abcde")), "source": images.path}
    neighbours = Neighbours(replace(UNKNOWN, **known), images)
    features = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    report_pictures(BLACK[:3], np.zeros(3), features, (), neighbours, np.array([0, 500, 999]))
    assert [name.split()[0] for name, _ in rows] == ["#0", "#999", "#500"]
    rows.clear()
    report_pictures(BLACK[:3], np.zeros(3), features, (), neighbours)
    assert [name.split()[0] for name, _ in rows] == ["#0", "#2", "#1"]


@pytest.mark.slow
def test_more_samples_than_are_pictured_are_scored_and_shown(tmp_path, local_ray):
    config = tiny_output(tmp_path, f"evaluate.num_samples={MAX_PREVIEW_IMAGES + 10}", "evaluate.batch_size=10")
    write_checkpoint(config, 2)
    report = evaluate(Path(config.folder("checkpoints")) / "step_0000002", config=config)
    assert (
        report.protocol.num_samples == MAX_PREVIEW_IMAGES + 10
        and f"fd_efficientnet_lite0_{MAX_PREVIEW_IMAGES + 10}" in report.metrics
    )
    assert {"samples", "classes", "neighbours", "page"} <= report.artifacts.keys()
