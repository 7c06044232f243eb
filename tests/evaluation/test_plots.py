"""Plots show their points, lines and labels where the values say, and are the same picture every time."""

import logging
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from evaluation.plots import style
from evaluation.plots.distances import plot_distances
from evaluation.plots.over_steps import StepValue, plot_lines, plot_metric_over_steps
from evaluation.plots.precision_recall import PrecisionRecall, plot_precision_recall
from evaluation.plots.style import ACCENT, COLOURS, REAL, SERIES
from evaluation.plots.time_shares import plot_time_shares

NO_POINTS = "no points to plot, expected at least one"


def pixels(picture, colour):
    """Return the rows and columns of the pixels that have exactly this colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return np.nonzero((np.asarray(picture) == wanted).all(axis=-1))


@pytest.fixture
def figures(monkeypatch):
    """The figures that plots render, to read their text and data."""
    seen = []
    render = style.render_image

    def remember(figure):
        seen.append(figure)
        return render(figure)

    for module in ("over_steps", "precision_recall", "time_shares"):
        monkeypatch.setattr(f"evaluation.plots.{module}.render_image", remember)
    return seen


def texts(figure):
    """Return all visible text of a figure."""
    artists = figure.findobj(matplotlib.text.Text)
    return [artist.get_text() for artist in artists if artist.get_visible() and artist.get_text()]


def box_of(artist, figure):
    return artist.get_window_extent(figure.canvas.get_renderer())


def top(figure, text):
    """Return the height of a text's upper edge."""
    artists = [artist for artist in figure.findobj(matplotlib.text.Text) if artist.get_text() == text]
    return max(box_of(artist, figure).y1 for artist in artists)


# A metric over steps


def test_points_are_where_their_steps_and_values_say():
    """Of two points the later is to the right and the smaller value lower, whatever the order of the points."""
    points = [StepValue(1000, 40.0), StepValue(500, 80.0)]
    picture = plot_metric_over_steps("fid_50k", points)
    rows, columns = pixels(picture, ACCENT)
    left, right = columns.argmin(), columns.argmax()
    assert rows[left] < rows[right] and columns[right] - columns[left] > 300
    assert np.array_equal(np.asarray(picture), np.asarray(plot_metric_over_steps("fid_50k", points[::-1])))


def test_errors_are_bars_and_real_images_a_line_with_their_value(figures):
    points = [StepValue(10, 5.0), StepValue(20, 9.0, 3.0)]
    plain = plot_metric_over_steps("x", [point._replace(error=0.0) for point in points])
    sure = plot_metric_over_steps("fid_50k", points, label="Fréchet distance ↓", real_baseline=1.9384)
    (plain_rows, plain_columns), (rows, columns) = pixels(plain, ACCENT), pixels(sure, ACCENT)
    last, plain_last = columns.max() - 7, plain_columns.max() - 7
    assert np.ptp(rows[columns >= last]) > 2 * np.ptp(plain_rows[plain_columns >= plain_last])
    assert np.ptp(pixels(sure, REAL)[1]) > 600 and len(pixels(plain, REAL)[0]) == 0
    shown = texts(figures[1])
    assert {"fid_50k", "Fréchet distance ↓", "real images: 1.938", "samples ± standard error"} <= set(shown)


def test_images_seen_are_counted_below_the_steps(figures):
    points = [StepValue(200_000, 9.0), StepValue(400_000, 5.0)]
    for each in (0, 256):
        assert plot_metric_over_steps("x", points, images_per_step=each).size == (900, 480)
    without, counted = map(texts, figures)
    assert {"training step", "400,000"} <= set(without) and "images seen" not in without
    assert {"training step", "400,000", "images seen", "100M"} <= set(counted)
    images_seen, step, tick = (top(figures[1], text) for text in ("images seen", "training step", "400,000"))
    assert images_seen < step < tick


def test_one_checkpoint_is_a_plot_and_none_is_an_error():
    assert plot_metric_over_steps("x", [StepValue(0, 0.0)]).size == (900, 480)
    with pytest.raises(ValueError, match=NO_POINTS):
        plot_metric_over_steps("x", [])


# Lines


def test_lines_run_from_their_first_step_to_the_last_and_higher_values_are_higher(figures):
    lines = {"low": [(100, 0.5), (0, 1.0)], "high": [(50, 2.0), (70, math.inf), (100, 2.5)], "none": [(0, math.nan)]}
    (low_rows, low_columns), (high_rows, high_columns) = (
        pixels(plot_lines("loss", lines), colour) for colour in SERIES[:2]
    )
    (axes,) = figures[0].axes
    box, height = axes.bbox, figures[0].bbox.height
    inside_low, inside_high = (rows > height - box.y1 for rows in (low_rows, high_rows))  # below the legend
    low_rows, low_columns = low_rows[inside_low], low_columns[inside_low]
    high_rows, high_columns = high_rows[inside_high], high_columns[inside_high]
    assert abs(low_columns.min() - box.x0) <= 3 and abs(low_columns.max() - box.x1) <= 3
    assert abs(high_columns.min() - (box.x0 + box.x1) / 2) <= 4 and high_rows.max() < low_rows.min()
    assert low_rows[low_columns.argmax()] > low_rows[low_columns.argmin()]
    assert "none" not in texts(figures[0])


def test_names_of_lines_cover_neither_each_other_nor_a_line(figures):
    plot_lines(
        "loss", {name: [(0, 1.0), (10, 1.0)] for name in ("one", "two", "three", "four", "five", "six", "seven")}
    )
    (axes,) = figures[0].axes
    names = [box_of(text, figures[0]) for text in axes.get_legend().get_texts()]
    assert len(names) == 7 and all(before.x1 < after.x0 for before, after in zip(names, names[1:], strict=False))
    assert min(name.y0 for name in names) >= axes.bbox.y1 and names[-1].x1 < figures[0].bbox.x1
    assert max(name.y1 for name in names) < box_of(axes._left_title, figures[0]).y0


def test_no_finite_value_is_an_error():
    for points in ([], [(0, math.nan), (1, math.inf)]):
        with pytest.raises(ValueError, match=NO_POINTS):
            plot_lines("x", {"a": points})


# Precision and recall

POINTS = [PrecisionRecall(1000, 0.4, 0.3), PrecisionRecall(2000, 0.8, 0.6)]


def test_more_precision_is_higher_and_more_recall_is_to_the_right(figures):
    picture = plot_precision_recall("protocol", POINTS)
    rows, columns = pixels(picture, ACCENT)
    left, right = columns.argmin(), columns.argmax()
    assert rows[right] < rows[left] and columns[right] - columns[left] > 250
    assert np.array_equal(np.asarray(picture), np.asarray(plot_precision_recall("protocol", POINTS[::-1])))
    assert {"1,000", "2,000", "recall (diversity)", "precision (fidelity)", "protocol"} <= set(texts(figures[0]))


def test_steps_of_crowded_points_are_left_out_except_for_the_last(figures):
    plot_precision_recall("x", [*POINTS, *(PrecisionRecall(3000 + i, 0.8, 0.6 + 1e-4 * i) for i in range(20))])
    labels = figures[0].axes[0].texts
    assert [label.get_text() for label in labels] == ["3,019", "1,000"]


def test_one_checkpoint_has_a_precision_and_recall_and_none_is_an_error():
    assert plot_precision_recall("x", POINTS[:1]).size == (560, 560)
    with pytest.raises(ValueError, match=NO_POINTS):
        plot_precision_recall("x", [])


# Time


def test_a_bar_is_divided_in_the_proportion_of_its_parts(figures):
    picture = plot_time_shares("time", {"training": {"steps": 7500.0, "nothing": 0.0, "data wait": 2500.0}})
    counts = [len(pixels(picture, colour)[0]) for colour in SERIES[:3]]
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.1) and counts[2] == 0
    assert {"time", "training: 10,000.0 s", "steps 75.0%", "data wait 25.0%", "seconds"} <= set(texts(figures[0]))


def test_every_row_is_a_bar_of_its_own_and_equal_parts_have_one_colour():
    one = plot_time_shares("time", {"a": {"steps": 1.0}})
    two = plot_time_shares("time", {"a": {"steps": 1.0}, "b": {"wait": 3.0, "steps": 1.0}})
    assert two.size[1] > one.size[1] + 100
    assert len(pixels(two, SERIES[0])[0]) > 1.15 * len(pixels(one, SERIES[0])[0])


def test_no_time_is_an_error():
    with pytest.raises(ValueError, match="no time to plot, expected at least one part above 0 s"):
        plot_time_shares("x", {"a": {"b": 0.0}})


# Distances over N


def marks(svg):
    """Return the centre of every point by its text on hovering, in pixels."""
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    groups = [group for group in root.iter("g") if group.find("title") is not None]
    return {group.find("title").text: tuple(float(group.find(".//use").get(k)) for k in "xy") for group in groups}


def test_distances_are_where_their_values_say_and_the_line_leads_through_them():
    """Equal steps in N are equal distances to the right, and smaller values are lower."""
    svg = plot_distances([(1000, 4.0), (2000, 3.0), (3000, 2.6667)], [(1000, 1.0)])
    found = marks(svg)
    (x1, y1), (x2, y2), (x3, y3) = (found[f"samples, N = {n}"] for n in ("1k: 4", "2k: 3", "3k: 2.6667"))
    assert x3 - x2 == pytest.approx(x2 - x1, abs=0.2) and x2 > x1
    assert (y2 - y1) / (y3 - y2) == pytest.approx(3, rel=0.02) and y2 > y1
    real_x, real_y = found["held-out real images, N = 1k: 1"]
    assert real_x == x1 and real_y > y3
    path = re.search(r'<g id="fit">\s*<path d="([^"]*)"', svg)[1]
    corners = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair.strip()]
    assert corners[0] == pytest.approx((x1, y1), abs=0.3) and corners[-1] == pytest.approx((x3, y3), abs=0.3)
    assert "N → ∞: 2</text>" in svg and ">3,000</text>" in svg and ">held-out real images</text>" in svg


def test_an_svg_takes_all_its_colours_from_the_page():
    """So that it is legible in dark mode, too."""
    svg = plot_distances([(1000, 4.0), (2000, 3.0), (3000, 2.6667)], [(1000, 1.0)])
    assert set(re.findall(r"var\(--(\w+)\)", svg)) == {*COLOURS} - {"ink"}
    assert not re.search(r"#[0-9a-f]{6}\b|stroke: (?!none|var)|fill: (?!none|var)", svg)
    assert not re.search(r"url\(|https?:|<\?|<!|font-family: (?!'DejaVu Sans')", svg)
    assert "<text" in svg and svg.startswith('<svg viewBox="0 0 700 320" role="img" aria-label="Fréchet distance')


# All plots


def test_plots_are_the_same_every_time_whatever_the_settings_of_matplotlib(monkeypatch):
    def draw():
        picture = plot_metric_over_steps("x", [StepValue(1, 2.0), StepValue(2, 1.0)], real_baseline=0.5)
        return picture.tobytes(), plot_distances([(1000, 4.0), (2000, 3.0), (3000, 2.6667)], [(1000, 1.0)])

    before = draw()
    for name, value in {"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None, "axes.facecolor": "red"}.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    settings = dict(matplotlib.rcParams)
    assert draw() == before
    assert dict(matplotlib.rcParams) == settings


def test_plots_need_no_display_and_are_silent_without_a_folder_for_fonts(tmp_path):
    code = (
        "from evaluation.plots.over_steps import plot_lines; import sys;"
        "assert 'matplotlib' not in sys.modules; print(plot_lines('x', {'a': [(0, 1.0)]}).size);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"PATH": "", "MPLCONFIGDIR": str(tmp_path / "file" / "folder"), "HOME": "/nonexistent"}
    (tmp_path / "file").touch()
    environment["PYTHONPATH"] = ":".join(sys.path)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (run.stdout, run.stderr) == ("(900, 420)\n", "")
    assert logging.getLogger("matplotlib").level == logging.NOTSET
