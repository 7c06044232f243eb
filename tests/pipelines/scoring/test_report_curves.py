"""The figures of all reports of a protocol."""

import io

import pytest
from PIL import Image

from cluster import storage
from pipelines.scoring.report_files import report_files, save_figures


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_reports_of_one_protocol_make_a_curve_and_precision_against_recall(story, tmp_path, request, place):
    evaluations = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_bucket")
    protocol = story.reports[2].protocol_id
    folder = storage.join(evaluations, protocol)
    for step in (2, 4):
        assert save_figures(folder) == []  # one point is no curve
        name = f"step_{step:07d}"
        here, there = storage.join(story.config.folder("evaluations"), protocol, name), storage.join(folder, name)
        for file in storage.list_files(here):
            storage.write_atomically(storage.join(there, file), storage.read_bytes(storage.join(here, file)))
    figures = save_figures(folder, images_per_step=8)
    assert figures == [f"{folder}/curve.png", f"{folder}/precision_recall.png"]
    sizes = [Image.open(io.BytesIO(storage.read_bytes(figure))).size for figure in figures]
    assert sizes == [(900, 480), (560, 560)]
    reports = [f"{folder}/step_{step:07d}/report.json" for step in (2, 4)]
    assert report_files(folder, None) == report_files(evaluations, None, None) == reports
    assert report_files(evaluations, protocol, "step_0000004") == reports[1:]
    assert report_files(evaluations, "0" * 12, None) == report_files(folder + "-none", None) == []
