"""An official file holds weights alone: what an import has to be told of them, the export says."""

import shlex
from dataclasses import replace

import pytest
from tiny_checkpoint import MODEL, tiny_output, write_checkpoint

from dit.checkpoint import load_checkpoint
from dit.config import DiTConfig
from dit.formats.official import fields_to_give

TOLD = "which `raydit import` needs: "


@pytest.mark.parametrize("dropout", [0.1, 0.0], ids=["null class", "no null class"])
def test_an_import_with_the_options_that_the_export_names_is_the_same_checkpoint(raydit, tmp_path, dropout):
    """Without them, the last of the classes without a null class would become the null class."""
    model = replace(MODEL, class_dropout_prob=dropout)
    ours = write_checkpoint(tiny_output(tmp_path), 2, model)
    file, back = str(tmp_path / "weights.pt"), tmp_path / "back"
    code, out, err = raydit("export", str(ours.path), file, "--format", "official")
    assert (code, err) == (0, "") and TOLD in out
    (line,) = (line for line in out.splitlines() if TOLD in line)
    assert raydit("import", file, str(back), *shlex.split(line.partition(TOLD)[2]))[0] == 0
    found, expected = load_checkpoint(back).record, ours.record
    assert (found.model_config, found.objective) == (expected.model_config, expected.objective)
    assert found.autoencoder.sha256 == expected.autoencoder.sha256
    assert ("model.num_classes=3" in line) == (dropout == 0) and "--objective flow" in line


def test_a_published_model_needs_no_options():
    assert fields_to_give(DiTConfig()) == {}
    assert fields_to_give(DiTConfig(num_classes=0)) == {}
    assert fields_to_give(DiTConfig(num_heads=18)) == {"num_heads": 18}
    assert fields_to_give(DiTConfig(class_dropout_prob=0.0)) == {"num_classes": 1000}
