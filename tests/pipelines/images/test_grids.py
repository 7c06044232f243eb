"""Grids of images: names take little room beside large images, whatever their length."""

import numpy as np
import pytest
from PIL import ImageFont
from tiny_checkpoint import tiny_output, write_checkpoint

from pipelines.images.grids import GAP_PX, labelled_grid, require_png_name
from raydit.errors import InvalidInput

LARGE, SMALL = (np.zeros((2, side, side, 3), np.uint8) for side in (256, 8))


@pytest.mark.parametrize(("images", "font_px", "cell_px"), [(LARGE, 20, 256), (SMALL, 13, 64)])
def test_a_margin_is_as_wide_as_a_name_in_a_small_font(images, font_px, cell_px):
    margin = 2 * GAP_PX + int(ImageFont.load_default(size=font_px).getlength("golden retriever"))
    assert labelled_grid([("golden retriever", images)]).width == margin + 2 * (cell_px + GAP_PX)


SHORTENED = "x" * 29 + "..."


@pytest.mark.parametrize(("name", "shown"), [("x" * 1000, SHORTENED), ("x" * 33, SHORTENED), ("a\nb", "a b")])
def test_a_long_name_is_shortened_and_one_of_several_lines_joined(name, shown):
    assert labelled_grid([(name, SMALL)]).tobytes() == labelled_grid([(shown, SMALL)]).tobytes()


def test_a_name_of_32_characters_is_shown_in_full():
    grids = [labelled_grid([(name, SMALL)]).tobytes() for name in ("x" * 32, SHORTENED)]
    assert grids[0] != grids[1]


@pytest.mark.parametrize("name", ["g.jpg", "a/G.JPEG", "s3://bucket/g.webp?region=x", "g.png.npz"])
def test_a_name_of_another_format_than_png_is_refused(name):
    with pytest.raises(InvalidInput, match=r"^--out: found .*written as PNG.*expected a name that ends in \.png"):
        require_png_name(name)


@pytest.mark.parametrize("name", ["g.png", "G.PNG", "g", "grid.v2", "a.jpg/g.png", "s3://bucket/g.png?x=a.jpg"])
def test_other_names_are_accepted(name):
    require_png_name(name)


def test_nothing_is_sampled_or_written_for_a_name_of_another_format(raydit, tmp_path):
    checkpoint = write_checkpoint(tiny_output(tmp_path), 2)
    code, out, err = raydit("sample", str(checkpoint.path), "--out", str(tmp_path / "g.jpg"))
    assert (code, out) == (2, "") and f"Use --out {tmp_path}/g.png" in err
    assert not (tmp_path / "g.jpg").exists()
