"""Figures over all reports of a protocol."""

import io
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from cluster import storage
from pipelines.scoring.reports.report_curves import load_reports_by_step, save_curves, step_of
from pipelines.scoring.reports.report_files import find_report_files, save_report


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_reports_of_one_protocol_make_a_curve_and_precision_against_recall(story, tmp_path, request, place):
    evaluations = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_bucket")
    protocol = story.reports[2].protocol_id
    folder = storage.join(evaluations, protocol)
    for step in (2, 4):
        assert save_curves(load_reports_by_step(folder), folder) == []  # one point is no curve
        name = f"step_{step:07d}"
        here, there = storage.join(story.config.folder("evaluations"), protocol, name), storage.join(folder, name)
        for file in storage.list_files(here):
            storage.write_atomically(storage.join(there, file), storage.read_bytes(storage.join(here, file)))
    figures = save_curves(load_reports_by_step(folder), folder, images_per_step=8)
    assert figures == [f"{folder}/curve.png", f"{folder}/precision_recall.png"]
    sizes = [Image.open(io.BytesIO(storage.read_bytes(figure))).size for figure in figures]
    assert sizes == [(900, 480), (560, 560)]
    reports = [f"{folder}/step_{step:07d}/report.json" for step in (2, 4)]
    assert find_report_files(folder, None) == find_report_files(evaluations, None, None) == reports
    assert find_report_files(evaluations, protocol, "step_0000004") == reports[1:]
    assert find_report_files(evaluations, "0" * 12, None) == find_report_files(folder + "-none", None) == []


def test_reports_of_a_superseded_training_are_not_in_the_curve(story, tmp_path):
    """Their checkpoints lie in superseded/, or others lie in their place; those that were only removed stay.

    A report that records no digest is taken for one of the checkpoint that is there.
    """
    recorded = story.reports[2]
    folder, output = tmp_path / "evaluations" / recorded.protocol_id, tmp_path / "output"
    places = {1: "superseded/checkpoints-1", 2: "checkpoints", 3: "checkpoints", 4: None, 5: "checkpoints"}
    digests = {3: "f" * 64, 5: ""}
    for step, place in places.items():
        digest = digests.get(step, recorded.checkpoint_digest)
        checkpoint = str(output / "checkpoints" / f"step_{step:07d}")
        report = replace(recorded, checkpoint=checkpoint, checkpoint_digest=digest)
        save_report(report, str(folder / f"step_{step:07d}"))
        if place:
            shutil.copytree(story.checkpoints[2].path, output / place / f"step_{step:07d}")
    assert [step_of(report) for report in load_reports_by_step(str(folder))] == [2, 4, 5]
