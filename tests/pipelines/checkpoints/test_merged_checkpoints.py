"""Checkpoints that are made from others: they lie anywhere, and hold finite weights."""

import json
import shutil

import pytest
from tiny_adapter import write_factors
from tiny_checkpoint import tiny_output, write_checkpoint

from dit.formats.completion import write_completion
from pipelines.checkpoints.adapters import import_adapter, merge_checkpoints
from pipelines.checkpoints.autoencoder import checkpoint_autoencoder
from pipelines.checkpoints.open import open_checkpoint


@pytest.fixture
def adapted(tmp_path):
    """An adapter, and its base, whose autoencoder has a path relative to the working directory of its recipe."""
    base = write_checkpoint(tiny_output(tmp_path), 2)
    content = json.loads((base.path / "config.json").read_text())
    content["autoencoder"]["id"] = "output/autoencoder"
    write_completion(base.path, content)
    return import_adapter(write_factors(tmp_path / "factors", 0), tmp_path / "adapted", base.path)


def name_relative(checkpoint):
    """As a copy of an adapter's checkpoint records it, of which the recipe's working directory is not known."""
    content = json.loads((checkpoint.path / "config.json").read_text())
    content["autoencoder"]["id"] = "output/autoencoder"
    write_completion(checkpoint.path, content)
    return open_checkpoint(checkpoint.path)


@pytest.mark.parametrize("make", ["import", "merge"])
def test_the_autoencoder_of_an_import_or_merge_is_found_from_every_folder(adapted, tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    if make == "import":
        base = adapted.base.uri
        made = import_adapter(tmp_path / "factors", tmp_path / "made", base)
    else:
        made = merge_checkpoints([(name_relative(adapted), 1.0)], tmp_path / "made")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checkpoint_autoencoder(open_checkpoint(made.path)) == tmp_path / "output" / "autoencoder"


def test_shares_with_which_weights_are_not_finite_are_refused(raydit, adapted, tmp_path):
    code, _, err = raydit("merge", f"{adapted.path}=1e308", str(tmp_path / "made"))
    assert code == 2 and "the merged weights" in err and "NaN or infinite" in err and "Choose smaller shares" in err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"mlp_ratio": 2.0}}, "another model (mlp_ratio 2.0), expected mlp_ratio 4.0, as of"),
        (
            {"model": {"num_classes": 2}, "class_names": ["a", "b"]},
            "another classes (('a', 'b')), expected ('blob', 'ring', 'stripe'), as of",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_told_by_what_differs(raydit, adapted, tmp_path, change, message):
    other = shutil.copytree(adapted.path, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    content |= change | {"model": content["model"] | change["model"]}
    write_completion(other, content)
    code, _, err = raydit("merge", f"{adapted.path}=1", f"{other}=1", str(tmp_path / "made"))
    assert code == 2 and message in err
