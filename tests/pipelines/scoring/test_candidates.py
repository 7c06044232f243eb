"""What a search measures of a candidate besides its distance."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.extractors import Features
from evaluation.metrics import frechet_distance
from evaluation.reference import ReferenceStatistics
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.tune import TuneGrid
from pipelines.scoring.candidates import RealFeatures
from pipelines.scoring.protocols import checkpoint_recipe, evaluation_protocol
from pipelines.scoring.settings import ScoringSettings
from pipelines.tune import SEED_OFFSET, plan_candidates


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


def test_a_candidate_has_the_protocol_of_an_evaluation_by_its_recipe(tmp_path):
    opened = open_checkpoint(write_checkpoint(tiny_output(tmp_path, "evaluate.num_samples=20"), 2).path)
    grid = TuneGrid(cfg_scale=(1.0, 2.0), weights=("ema", "raw"))
    candidates = plan_candidates([opened], checkpoint_recipe, grid)
    for each in candidates:
        settings = replace(ScoringSettings.from_recipe(each.config), seed=each.config.seed + SEED_OFFSET)
        assert each.protocol == evaluation_protocol(settings, opened)
    assert len({each.protocol.protocol_id for each in candidates}) == 4
