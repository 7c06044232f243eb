"""The figures of all reports of a protocol."""

import shutil

from PIL import Image

from pipelines.reports import save_figures


def test_reports_of_one_protocol_make_a_curve_and_precision_against_recall(story, tmp_path):
    protocol = story.reports[2].protocol_id
    source = story.config.local_folder("evaluations") / protocol
    for step in (2, 4):
        assert save_figures(tmp_path / protocol) == []  # one point is no curve
        name = f"step_{step:07d}"
        shutil.copytree(source / name, tmp_path / protocol / name)
    figures = save_figures(tmp_path / protocol, images_per_step=8)
    assert [figure.name for figure in figures] == ["curve.png", "precision_recall.png"]
    assert [Image.open(figure).size for figure in figures] == [(900, 480), (560, 560)]
