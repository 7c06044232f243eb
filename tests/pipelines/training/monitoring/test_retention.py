"""Which checkpoints are kept."""

import json
from types import SimpleNamespace

import pytest

from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.reader import RecipeError, validate_recipe
from pipelines.config.training import TrainConfig
from pipelines.training.monitoring.retention import Retention, best_step, explain_retention, outdated_steps
from raydit.errors import InvalidInput

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


DIGESTS = {step: f"digest-{step}" for step in STEPS}


def report(evaluations, protocol, step, digest="", **metrics):
    """Write a report of the checkpoint at a step, or of another one with a digest."""
    folder = evaluations / protocol / f"step_{step:07d}"
    folder.mkdir(parents=True)
    content = {"checkpoint_digest": digest or DIGESTS[step], "metrics": metrics}
    (folder / "report.json").write_text(json.dumps(content))


def test_the_best_checkpoint_has_the_lowest_distance_or_the_highest_score(tmp_path):
    assert best_step(str(tmp_path), "fid_50k", DIGESTS) is None
    report(tmp_path, "a", 100, fid_50k=9.0, is_50k=5.0)
    report(tmp_path, "a", 200, fid_50k=7.0, is_50k=4.0)
    report(tmp_path, "b", 300, fid_10k=1.0, fid_50k=1.0)  # by another protocol: no better
    report(tmp_path, "a", 400, fid_50k=0.5)
    file = tmp_path / "a" / "step_0000400" / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "disqualified": "its samples are of a single colour"}))
    assert best_step(str(tmp_path), "fid_50k", DIGESTS) == 200
    assert best_step(str(tmp_path), "is_50k", DIGESTS) == 100
    assert best_step(str(tmp_path), "fd_dinov2_vit_b_14_50k", DIGESTS) is None
    with pytest.raises(ValueError, match="fdi_50k"):
        best_step(str(tmp_path), "fdi_50k", DIGESTS)


def test_a_report_with_a_number_that_is_not_finite_is_named(tmp_path):
    report(tmp_path, "a", 100, fid_50k=float("nan"))
    report(tmp_path, "a", 200, fid_50k=7.0)
    with pytest.raises(InvalidInput, match=r"a/step_0000100/report.json: found nan in metrics.fid_50k, expected"):
        best_step(str(tmp_path), "fid_50k", DIGESTS)


def test_reports_of_a_superseded_training_or_of_removed_checkpoints_choose_nothing(tmp_path):
    """They do not decide by which protocol the others are compared either."""
    report(tmp_path, "a", 100, "superseded", fid_50k=1.0)
    report(tmp_path, "a", 200, "superseded", fid_50k=2.0)
    report(tmp_path, "a", 300, fid_50k=3.0)
    assert best_step(str(tmp_path), "fid_50k", DIGESTS) == 300
    report(tmp_path, "b", 400, fid_50k=8.0)
    report(tmp_path, "b", 500, fid_50k=7.0)
    assert best_step(str(tmp_path), "fid_50k", DIGESTS) == 500
    left = {step: digest for step, digest in DIGESTS.items() if step <= 300}
    assert best_step(str(tmp_path), "fid_50k", left) == 300


def test_ratios_to_other_held_out_images_are_not_compared(tmp_path):
    """Where a report of an older version does not say which they are, they are taken for the same."""
    digests = {100: "a" * 12, 200: "b" * 12, 300: "b" * 12, 400: ""}
    for step, digest in digests.items():
        report(tmp_path, "a", step, fdr_50k=step / 100, fid_50k=step / 100)
        file = tmp_path / "a" / f"step_{step:07d}" / "report.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "held_out_digest": digest}))
    assert best_step(str(tmp_path), "fdr_50k", DIGESTS) == 200
    assert best_step(str(tmp_path), "fid_50k", DIGESTS) == 100


def test_a_superseded_trainings_best_step_is_not_kept(tmp_path):
    report(tmp_path, "a", 100, "superseded", fid_50k=1.0)
    report(tmp_path, "a", 300, fid_50k=3.0)
    digests = dict(DIGESTS)
    checkpoints = SimpleNamespace(describe=lambda step: SimpleNamespace(digest=digests[step]), remove=digests.pop)
    protected = SimpleNamespace(filter_removable=lambda digests, force_refresh: digests)
    retention = Retention(keep(keep_last=1, keep_best="fid_50k"), checkpoints, str(tmp_path), protected)
    removed = list(retention.remove_outdated(STEPS, set()))
    assert removed == [DIGESTS[step] for step in (100, 200, 400, 500)] and list(digests) == [300, 600]


def test_a_report_without_a_digest_is_of_the_checkpoint_at_its_step(tmp_path):
    report(tmp_path, "a", 100, fid_50k=5.0)
    file = tmp_path / "a" / "step_0000100" / "report.json"
    file.write_text(json.dumps({"metrics": {"fid_50k": 5.0}}))
    assert best_step(str(tmp_path), "fid_50k", DIGESTS) == 100
    assert best_step(str(tmp_path), "fid_50k", {200: "digest-200"}) is None


@pytest.mark.parametrize(
    ("keep_every", "said"), [(12_000, "keeps a checkpoint every 60,000 steps"), (10_000, ""), (1000, ""), (None, "")]
)
def test_a_multiple_at_which_there_is_no_checkpoint_is_said(keep_every, said):
    train = TrainConfig(checkpoint_every=5000, keep_last=2, keep_every=keep_every)
    assert [said in line for line in explain_retention(train, EvaluateConfig())] == ([True] if said else [])


@pytest.mark.parametrize(
    ("metric", "evaluate", "is_said"),
    [
        ("fid_50k", {}, False),
        ("fid_50k", {"num_samples": 10_000}, True),
        ("fid_50000", {}, True),
        ("fid_50k", {"extractor": "efficientnet-lite0"}, True),
        ("fd_efficientnet_lite0_1k", {"extractor": "efficientnet-lite0", "num_samples": 1000}, False),
        ("fd_efficientnet_lite0_1k", {"extractors": ("inception", "efficientnet-lite0"), "num_samples": 1000}, False),
        ("mind_50k", {}, True),
        ("mind_50k", {"metrics": ("mind",)}, False),
        ("ratio_fid_10k", {}, False),
        ("fdr_10k", {}, True),
        ("fdr_10k", {"extractors": ("inception", "efficientnet-lite0")}, False),
        ("fid_50k", {"extractor_weights": "own.pth"}, False),
        ("fd_timm_resnet50_50k", {"extractor": "timm:resnet50"}, False),
        ("fd_transformers_vit_0123abcd_50k", {"extractor": "transformers:vit"}, False),
        ("validation/loss", {"num_samples": 1000}, False),
    ],
)
def test_a_best_metric_that_no_evaluation_of_the_recipe_reports_is_said(metric, evaluate, is_said):
    train = TrainConfig(keep_last=2, keep_best=metric, validate_every=50_000)
    said = explain_retention(train, EvaluateConfig(**evaluate))
    assert [f"train.keep_best = '{metric}' is not a metric" in line for line in said] == [True] * is_said


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
