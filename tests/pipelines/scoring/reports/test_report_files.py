"""What `raydit compare` and other commands take for a report."""

import json

import pytest
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.card import CARD_FILE, FORMAT

CARD = json.dumps({"format": FORMAT, "version": 1})


@pytest.mark.parametrize("command", ["compare", "publish"])
@pytest.mark.parametrize("given", [CARD_FILE, "."])
def test_a_card_is_named_as_such(raydit, tmp_path, command, given):
    (tmp_path / CARD_FILE).write_text(CARD)
    code, out, err = raydit(command, str(tmp_path / given))
    assert (code, out) == (2, "") and "KeyError" not in err
    assert f"raydit: {tmp_path / given}: found an evaluation card, which is not a report, expected a checkpoint" in err
    assert f"`raydit verify {tmp_path / given}`" in err


@pytest.mark.parametrize("content", ["{}", "[]", "[" * 5000, "{"])
def test_what_is_neither_is_no_report(raydit, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    code, out, err = raydit("compare", str(tmp_path / "other.json"))
    assert (code, out) == (2, "") and "other.json: found no report" in err and "card" not in err


def test_a_checkpoint_beside_whose_weights_a_card_lies_is_a_checkpoint(raydit, tmp_path):
    folder = write_checkpoint(tiny_output(tmp_path), 2).path
    (folder / CARD_FILE).write_text(CARD)
    code, _, err = raydit("compare", str(folder))
    assert code == 2 and "no report in" in err and "evaluation card" not in err
