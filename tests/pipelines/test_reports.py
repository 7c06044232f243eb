"""The figures of all reports of a protocol."""

import shutil
from pathlib import Path

from PIL import Image

from pipelines.reports import save_figures


def test_reports_of_one_protocol_make_a_curve_and_precision_against_recall(story, tmp_path):
    protocol = story.reports[2].protocol_id
    source = Path(story.config.folder("evaluations")) / protocol
    folder = str(tmp_path / protocol)
    for step in (2, 4):
        assert save_figures(folder) == []  # one point is no curve
        name = f"step_{step:07d}"
        shutil.copytree(source / name, tmp_path / protocol / name)
    figures = save_figures(folder, images_per_step=8)
    assert figures == [f"{folder}/curve.png", f"{folder}/precision_recall.png"]
    assert [Image.open(figure).size for figure in figures] == [(900, 480), (560, 560)]
