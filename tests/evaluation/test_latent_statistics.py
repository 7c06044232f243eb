"""Statistics of latents, against numpy and scipy on all of them at once."""

from functools import reduce

import numpy as np
import pytest
from scipy.stats import kurtosis

from evaluation.latent_statistics import LatentStatistics


@pytest.fixture(scope="module")
def latents():
    """(20, 3, 4, 4), with long tails, a large mean, and two channels that are alike."""
    values = np.random.default_rng(0).standard_t(5, (20, 3, 4, 4)) * 2
    values[:, 1] += 100
    values[:, 2] = 0.6 * values[:, 0] + 0.1 * values[:, 2]
    return values


@pytest.mark.parametrize("cuts", [(), (1, 5, 5 + 1, 19), (10,)])
def test_merged_parts_give_the_statistics_of_all_latents(latents, cuts):
    parts = np.split(latents, cuts)
    found = reduce(LatentStatistics.merge, map(LatentStatistics.of, parts))
    flat = latents.transpose(1, 0, 2, 3).reshape(3, -1)
    assert found.n == flat.shape[1]
    np.testing.assert_allclose(found.mean, flat.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.std, flat.std(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.kurtosis, kurtosis(flat, axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.correlations, np.corrcoef(flat), rtol=1e-9, atol=1e-12)


def test_the_summary_is_over_all_channels(latents):
    found = LatentStatistics.of(latents)
    flat = latents.transpose(1, 0, 2, 3).reshape(3, -1)
    correlations = np.corrcoef(flat)[np.triu_indices(3, 1)]
    assert found.metrics() == pytest.approx(
        {
            "latent_mean": np.sqrt((flat.mean(axis=1) ** 2).mean()),
            "latent_std": np.sqrt(flat.var(axis=1).mean()),
            "latent_kurtosis": kurtosis(flat, axis=1).mean(),
            "latent_correlation": np.sqrt((correlations**2).mean()),
        }
    )


@pytest.mark.parametrize("constant", [1.0, 0.1, -1e-3, 1e8 / 3])
def test_a_constant_or_single_channel_has_neither_tails_nor_correlations(constant):
    """The mean of most constants is rounded to another number."""
    latents = np.full((30, 2, 3, 3), constant)
    latents[:, 1] = np.random.default_rng(0).normal(size=(30, 3, 3))
    for parts in (latents,), (latents[:11], latents[11:]):
        found = reduce(LatentStatistics.merge, map(LatentStatistics.of, parts))
        assert (found.mean[0], found.std[0], found.kurtosis[0], found.correlations[0, 1]) == (constant, 0, 0, 0)
    assert LatentStatistics.of(latents[:, 1:]).metrics()["latent_correlation"] == 0
