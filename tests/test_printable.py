"""What others named cannot move the cursor of a terminal, or forge a line of its output."""

import pytest
from tiny import tiny_recipe

from cluster.storage.lease import UNKNOWN_OWNER, _in_use
from evaluation.report import align_columns
from pipelines.console import say
from pipelines.tracking.provenance import run_description
from raydit.printable import one_line, printable

FORGED = "cats\x1b[2K\rraydit: all good\x07\u202e"


def test_control_characters_are_escaped_and_all_others_stay():
    assert printable(FORGED) == r"cats\x1b[2K\x0draydit: all good\x07\u202e"
    plain = "\u732b, \u00e9\u0301 and \U0001f469\u200d\U0001f680\twith a tab\nand a line"
    assert printable(plain) == plain
    assert one_line("a\nb") == r"a\nb"


def test_a_name_stays_in_its_line(capsys):
    say("encode", f"{FORGED}\nencode       done")
    assert capsys.readouterr().out == rf"encode       {printable(FORGED)}\nencode       done" + "\n"
    assert align_columns([["a\nb", "\x1bc"]]) == [r"a\nb  \x1bc"]


def test_an_error_message_is_escaped(raydit_error):
    assert raydit_error(FORGED) == f"\nraydit: {printable(FORGED)}\n"


@pytest.fixture
def raydit_error(monkeypatch, capsys):
    from pipelines.cli import main
    from raydit.errors import InvalidInput

    def call(text):
        def fail(**_):
            raise InvalidInput(text, "", "")

        monkeypatch.setattr(main.cli, "main", fail)
        with pytest.raises(SystemExit):
            main.main()
        return capsys.readouterr().err

    return call


def test_the_command_that_stops_another_owner_runs_nothing_else():
    from dataclasses import replace

    owner = replace(UNKNOWN_OWNER, job="x; rm -rf ~", user="a", host="b", expires=1e9)
    assert "raydit jobs stop 'x; rm -rf ~'" in str(_in_use("/output/.lease.json", owner, "output"))


def test_a_recipes_name_stays_code_in_the_description_of_a_run(tmp_path):
    config = tiny_recipe(tmp_path, 'name="a`[b](javascript:c)`"')
    assert "of the recipe `` a`[b](javascript:c)` ``, in" in run_description(config, "train", {})
