"""Which checkpoints are kept."""

import json
from types import SimpleNamespace

import pytest

from pipelines.config.reader import RecipeError, validate_recipe
from pipelines.training.retention import best_step, outdated_steps

STEPS = [100, 200, 300, 400, 500, 600]


def keep(**settings):
    return SimpleNamespace(**{"keep_last": None, "keep_every": None, **settings})


@pytest.mark.parametrize(
    ("settings", "best", "kept"),
    [
        ({}, None, STEPS),
        ({"keep_last": 1}, None, [600]),
        ({"keep_last": 2}, 300, [300, 500, 600]),
        ({"keep_last": 1, "keep_every": 200}, None, [200, 400, 600]),
        ({"keep_last": 1, "keep_every": 200}, 100, [100, 200, 400, 600]),
        ({"keep_last": 9}, 100, STEPS),
    ],
)
def test_the_newest_the_multiples_and_the_best_are_kept(settings, best, kept):
    assert [step for step in STEPS if step not in outdated_steps(STEPS[::-1], keep(**settings), best)] == kept


def report(evaluations, protocol, step, **metrics):
    folder = evaluations / protocol / f"step_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"metrics": metrics}))


def test_the_best_checkpoint_has_the_lowest_distance_or_the_highest_score(tmp_path):
    assert best_step(str(tmp_path), "fid_50k") is None
    report(tmp_path, "a", 100, fid_50k=9.0, is_50k=5.0)
    report(tmp_path, "a", 200, fid_50k=7.0, is_50k=4.0)
    report(tmp_path, "b", 300, fid_10k=1.0, fid_50k=1.0)  # by another protocol: no better
    report(tmp_path, "a", 400, fid_50k=0.5)
    file = tmp_path / "a" / "step_0000400" / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "disqualified": "its samples are of a single colour"}))
    assert best_step(str(tmp_path), "fid_50k") == 200
    assert best_step(str(tmp_path), "is_50k") == 100
    assert best_step(str(tmp_path), "fd_dinov2_vit_b_14_50k") is None
    with pytest.raises(ValueError, match="fdi_50k"):
        best_step(str(tmp_path), "fdi_50k")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_every": 100}, "train.keep_every: found 100 without keep_last.*Set keep_last"),
        ({"keep_best": "fid_50k"}, "train.keep_best: found 'fid_50k' without keep_last"),
        (
            {"sample_every": 75, "checkpoint_every": 50},
            "train.sample_every: found 75.*multiple of checkpoint_every = 50",
        ),
        ({"num_workers": [3, 2]}, r"train.num_workers: found \[3, 2\], expected \[fewest, most\]"),
        ({"num_workers": [1, 9], "global_batch_size": 8}, "most <= global_batch_size = 8"),
        (
            {"num_workers": [1, 5], "global_batch_size": 8, "accumulation_steps": 2},
            "most <= global_batch_size / accumulation_steps = 4",
        ),
        (
            {"global_batch_size": 12, "num_workers": 2, "accumulation_steps": 4},
            "num_workers = 2 . accumulation_steps = 4",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    recipe = {"name": "a", "output": "b", "images": {"path": "digits"}, "autoencoder": {"id": "c"}}
    with pytest.raises(RecipeError, match=message):
        validate_recipe({**recipe, "model": {"name": "DiT-S/2"}, "train": settings})
