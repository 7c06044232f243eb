"""What a search measures of a candidate besides its distance."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from drawn_records import DIM, write_records
from fakes import FakeContext
from tiny import RECIPE, places
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.extractors import Features
from evaluation.halving import Measured, search
from evaluation.metrics import frechet_distance
from evaluation.reference import ReferenceStatistics
from pipelines.checkpoints.open import open_checkpoint
from pipelines.cli.main import cli
from pipelines.config.tune import DEFAULT_SCALES, TuneGrid
from pipelines.scoring.protocols.build_protocol import checkpoint_recipe, evaluation_protocol
from pipelines.scoring.protocols.given_recipe import load_given_recipe
from pipelines.scoring.real_images import references
from pipelines.scoring.real_images.references import load_real_features
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.tuning import candidates as candidates_module
from pipelines.scoring.tuning.candidates import RealFeatures, real_images, sample_candidates
from pipelines.tune import (
    BUDGET,
    MIN_SAMPLES,
    SEED_OFFSET,
    default_grid,
    plan_candidates,
    reported_protocols,
    tune_identity,
    tune_rungs,
)
from raydit.errors import InvalidInput

SOURCE = """
def means(images):
    return images.float().mean(dim=(2, 3))

def deviations(images):
    return images.float().std(dim=(2, 3))
"""


@pytest.fixture
def opened(tmp_path):
    return open_checkpoint(write_checkpoint(tiny_output(tmp_path, "evaluate.num_samples=20"), 2).path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with the functions of SOURCE, in the working directory."""
    name = f"tuned_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return name


def test_ratios_need_as_many_images_as_in_reports():
    rng = np.random.default_rng(0)
    real, held_out, samples = rng.normal(size=(200, 8)), rng.normal(size=(40, 8)), rng.normal(1, 1, size=(60, 8))
    reference = ReferenceStatistics(
        n=200, mu=real.mean(0), sigma=np.cov(real, rowvar=False), extractor="x", extractor_sha256="x"
    )
    of_real = RealFeatures.of(reference, Features(held_out))
    mean, cov = samples[:40].mean(0), np.cov(samples[:40], rowvar=False)
    distance = frechet_distance(reference.mu, reference.sigma, mean, cov)
    floor = frechet_distance(reference.mu, reference.sigma, held_out.mean(0), np.cov(held_out, rowvar=False))
    assert of_real.ratio(samples) == pytest.approx(distance / floor)
    assert of_real.ratio(samples[:16]) is None  # of 17, twice the dimensions and one, there would be one
    assert of_real.ratio(samples[:17]) is not None


def test_a_candidate_has_the_protocol_of_an_evaluation_by_its_recipe(opened):
    grid = TuneGrid(cfg_scale=(1.0, 2.0), weights=("ema", "raw"))
    candidates = plan_candidates([opened], checkpoint_recipe, grid)
    for each in candidates:
        settings = replace(ScoringSettings.from_recipe(each.config), seed=each.config.seed + SEED_OFFSET)
        assert each.protocol == evaluation_protocol(settings, opened)
    assert len({each.protocol.protocol_id for each in candidates}) == 4


def planned(opened, *overrides):
    """The candidates of a grid of one, by the checkpoint's recipe with overrides."""
    return plan_candidates([opened], lambda each: checkpoint_recipe(each, overrides), TuneGrid())


def extractors(*names):
    """The overrides by which some extractors score."""
    return f"evaluate.extractor={names[0]}", f"evaluate.extractors={list(names)}"


def test_the_identity_of_a_search_tells_further_extractors_apart_although_their_source_is_one_file(opened, module):
    identities = [
        tune_identity(planned(opened, *extractors("efficientnet-lite0", f"{module}:{name}")), [20], 0.35)
        for name in ("means", "deviations")
    ]
    assert identities[0] != identities[1]
    candidate = planned(opened)[0]
    assert tune_identity([candidate], [20], 0.35) == {
        "candidates": [[opened.digest, candidate.protocol.protocol_id]],
        "samples": [20],
        "budget": 0.35,
    }  # of one extractor, as ever


def test_checkpoints_that_are_scored_by_two_functions_of_a_module_are_not_compared(opened, module):
    recipes = iter([checkpoint_recipe(opened, extractors(f"{module}:{name}")) for name in ("means", "deviations")])
    with pytest.raises(InvalidInput, match=f"extractor = '{module}:deviations', expected '{module}:means'"):
        plan_candidates([opened, opened], lambda each: next(recipes), TuneGrid())


def test_workers_refuse_another_source_of_an_extractor(opened, module, tmp_path, monkeypatch):
    candidates = planned(opened, *extractors(f"{module}:means"))
    created = []
    monkeypatch.setattr(candidates_module, "compute_shards", lambda *arguments: created.append(arguments[3]))
    sample_candidates(None, candidates, [0], str(tmp_path / "records"), 20)
    created[0]()
    (tmp_path / f"{module}.py").write_text(SOURCE.replace("mean(", "sum("))
    with pytest.raises(InvalidInput, match="as on the machine that planned the work"):
        created[0]()


def test_checkpoints_of_other_trainings_have_the_first_ones_draws_and_records(opened):
    """A record is of as many samples for all, so that the rungs of the search are whole records."""
    first = checkpoint_recipe(
        opened, ("seed=3", "random=counter", "evaluate.labels=balanced", "evaluate.shard_rows=10")
    )
    other = checkpoint_recipe(opened, ("seed=4", "evaluate.labels=random", "evaluate.shard_rows=7"))
    recipes = iter([first, other])
    candidates = plan_candidates([opened, opened], lambda each: next(recipes), TuneGrid())
    for each in candidates:
        drawn = each.protocol.seed, each.protocol.random, each.protocol.labels
        assert drawn == (3 + SEED_OFFSET, "counter", "balanced")
        assert [protocol.seed for protocol in reported_protocols(each)] == [3]
        assert [len(shard.images) for shard in each.records("records", 20, 0)] == [10, 10]


def test_records_of_another_size_are_not_taken_for_those_of_a_search(opened):
    few, many = (planned(opened, f"evaluate.shard_rows={rows}")[0] for rows in (10, 20))
    assert few.protocol == many.protocol
    files = [{shard.file for shard in each.records("records", 20, 0)} for each in (few, many)]
    assert not files[0] & files[1]


@pytest.mark.parametrize(
    ("num_samples", "shard_rows", "expected"),
    [
        (50_000, 100, [5_500, 16_600, 50_000]),
        (1_000, 100, [100, 300, 1_000]),
        (200, 100, [22, 66, 200]),
        (200, 15, [30, 60, 200]),
        (60, 100, [20, 60]),
    ],
)
def test_the_first_rung_is_a_ninth_and_a_search_of_equal_candidates_keeps_to_the_budget(
    opened, num_samples, shard_rows, expected
):
    recipe = checkpoint_recipe(opened, (f"evaluate.num_samples={num_samples}", f"evaluate.shard_rows={shard_rows}"))
    sizes = tune_rungs(recipe)
    assert sizes == expected
    (candidate,) = plan_candidates([opened], lambda each: recipe, TuneGrid())
    for fewer, size in itertools.pairwise(sizes):  # what is recorded on one rung is there on the next
        assert {*candidate.records("records", fewer, 0)} <= {*candidate.records("records", size, 0)}
    equal = Measured(1.0, np.ones(10))
    rungs = search([1.0] * 8, sizes, BUDGET, lambda chosen, count: [equal] * len(chosen))
    assert rungs[-1].spent <= max(BUDGET, sizes[0] / num_samples)


@pytest.mark.parametrize(("budget", "share"), [("0.35", "35%"), ("0.05", "11%")])
def test_a_plan_says_what_the_search_may_cost(opened, budget, share):
    flags = ["--dry-run", "--cfg-scale", "1,2", "--num-samples", "200", "--set", "evaluate.shard_rows=100"]
    flags += ["--budget", budget]
    result = CliRunner().invoke(cli, ["tune", opened.origin, *flags], catch_exceptions=False)
    assert f"2 candidates on 22, 66, 200 samples, at most {share} of what scoring all" in result.output


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--cfg-interval", "0.2", "LOW:HIGH such as 0.2:0.8, or always, separated by commas"),
        ("--cfg-interval", "0.2:0.5:0.8", "LOW:HIGH such as 0.2:0.8, or always, separated by commas"),
        ("--cfg-scale", "1;2", "numbers, separated by commas"),
        ("--sampling-steps", "10,2.5", "integers, separated by commas"),
    ],
)
def test_a_value_of_another_form_is_refused_by_the_form_that_is_expected(opened, flag, value, expected):
    result = CliRunner().invoke(cli, ["tune", opened.origin, "--dry-run", flag, value])
    assert (
        result.exit_code == 2 and f"Invalid value for '{flag}': found {value!r}, expected {expected}" in result.output
    )


def test_as_few_samples_as_the_option_takes_are_searched_on(opened):
    (option,) = (each for each in cli.commands["tune"].params if each.name == "num_samples")
    assert option.type.min == MIN_SAMPLES
    flags = ["--dry-run", "--cfg-scale", "1,2", "--num-samples"]
    run = [CliRunner().invoke(cli, ["tune", opened.origin, *flags, f"{MIN_SAMPLES - less}"]) for less in (0, 1)]
    assert [result.exit_code for result in run] == [0, 2]
    assert "19 is not in the range x>=20" in run[1].output


def test_a_budget_that_is_no_number_is_refused(opened):
    result = CliRunner().invoke(cli, ["tune", opened.origin, "--dry-run", "--budget", "nan"], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].endswith("Invalid value for '--budget': nan is not a finite number.")


def test_a_grid_of_no_values_fits_a_recipe_with_autoguidance(opened):
    """A scale of 1 is no guidance, which the recipe refuses."""
    recipe = checkpoint_recipe(opened, (f"evaluate.autoguidance={opened.origin}", "evaluate.cfg_scale=2"))
    assert default_grid([opened], [checkpoint_recipe(opened)]).cfg_scale == DEFAULT_SCALES
    assert default_grid([opened], [recipe]).cfg_scale == DEFAULT_SCALES[1:]
    assert default_grid([opened] * 2, [recipe, checkpoint_recipe(opened)]).cfg_scale == DEFAULT_SCALES[1:]


def test_a_grid_of_no_values_has_every_average_of_the_checkpoint_whatever_recipe_is_given(tmp_path):
    config = tiny_output(tmp_path, "train.ema_sigma_rels=[0.05]", "evaluate.num_samples=20")
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    recipe_of = load_given_recipe(str(RECIPE), (*places(tmp_path), "evaluate.num_samples=20"))
    grid = default_grid([opened], [recipe_of(opened)])
    assert grid.weights == ("ema", "ema_0.05")
    assert len(plan_candidates([opened], recipe_of, grid)) == 2 * len(DEFAULT_SCALES)


def test_the_images_of_an_adm_reference_serve_recall(opened, tmp_path, monkeypatch):
    """The file has mean, covariance and images, but no features."""
    images = np.zeros((12, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(DIM), sigma=np.eye(DIM), arr_0=images)
    monkeypatch.setattr("pipelines.tune.check_scoring_inputs", lambda *_: None)
    for module in (candidates_module, references):
        monkeypatch.setattr(module, "compute_shards", lambda context, stage, shards, *_: write_records(shards))
    candidates = planned(opened, f"evaluate.reference={tmp_path / 'adm.npz'}")
    sample_candidates(FakeContext(), candidates, [0], str(tmp_path / "records"), 20)
    (real,) = real_images(candidates).each_extractor
    of_real = RealFeatures.of(*load_real_features(real))
    assert of_real.features is not None and of_real.features.shape == (12, DIM)
    assert of_real.recall(np.zeros((20, DIM))) is not None
