"""Successive halving on landscapes whose best candidate is known."""

import numpy as np
import pytest

from evaluation.halving import Measured, difference_error, plan_rungs, search

BLOCKS, SPREAD = 10, 30.0


class Landscape:
    """Candidates with known distances, measured with a bias and a noise that they mostly share.

    A sample's contribution to the distance is normal around it; those of all candidates are correlated, as they are
    for samples with the same label and noise.
    """

    def __init__(self, distances, biases=None, seed=0, samples=900):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=samples) * SPREAD
        own = rng.normal(size=(len(distances), samples)) * SPREAD / 5
        self.values = np.array(distances)[:, None] + shared + own
        self.biases = np.zeros(len(distances)) if biases is None else np.array(biases)
        self.calls = []

    def measure(self, chosen, count):
        self.calls.append((list(chosen), count))
        return [self._measure(candidate, count) for candidate in chosen]

    def _measure(self, candidate, count):
        values, parts = self.values[candidate, :count], np.arange(count) % BLOCKS
        left_out = [
            values[parts != part].mean() + self.biases[candidate] / (parts != part).sum() for part in range(BLOCKS)
        ]
        return Measured(values.mean() + self.biases[candidate] / count, np.array(left_out))

    def truth(self):
        """The candidate that is best on all samples, and the error of its distance."""
        found = self._measure_all()
        best = int(np.argmin([each.value for each in found]))
        return best, found

    def _measure_all(self):
        return [self._measure(candidate, self.values.shape[1]) for candidate in range(len(self.values))]


def cost_of(rungs, costs, last):
    """The cost as it follows from which candidates were measured, on samples that are never computed twice."""
    samples = dict.fromkeys(range(len(costs)), 0)
    for rung in rungs:
        samples |= dict.fromkeys(rung.measured, rung.num_samples)
    return sum(costs[each] * count for each, count in samples.items()) / (sum(costs) * last)


@pytest.mark.parametrize("seed", range(20))
def test_the_result_is_within_an_error_of_the_best_of_the_full_grid_at_a_third_of_its_cost(seed):
    distances = 40 + 3 * (np.linspace(-3, 3, 24) - 0.7) ** 2
    landscape = Landscape(distances, seed=seed)
    costs = [1.0 if number < 12 else 2.0 for number in range(24)]
    rungs = search(costs, plan_rungs(900, 50), 0.35, landscape.measure)
    chosen, (best, full) = rungs[-1].kept[0], landscape.truth()
    assert full[chosen].value - full[best].value <= full[best].error
    assert rungs[-1].spent <= 0.35
    assert rungs[-1].spent == pytest.approx(cost_of(rungs, costs, 900))


def test_a_bias_that_falls_with_the_number_of_samples_does_not_decide():
    distances, biases = [10.0, 12.0, 30.0, 30.0, 30.0, 30.0], [900.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    landscape = Landscape(distances, biases)
    landscape.values = np.array(distances)[:, None] + np.zeros(900)  # without noise, the bias alone is left
    first = landscape.measure([0, 1], 100)
    assert first[0].value > first[1].value  # on few samples, the better one looks worse
    rungs = search([1.0] * 6, plan_rungs(900, 100), 0.35, landscape.measure)
    assert rungs[-1].kept == (0,)
    assert first[0].predict(100, 900) == pytest.approx(10 + 900 / 900, abs=0.2)


def test_candidates_that_differ_less_than_their_error_go_on_together():
    landscape = Landscape([10.0, 10.0, 10.0, 60.0, 60.0, 60.0, 60.0, 60.0], seed=3)
    first = search([1.0] * 8, [90, 900], 1.0, landscape.measure)[0]
    assert set(first.kept) == {0, 1, 2}


def test_common_random_numbers_make_the_error_of_a_difference_smaller_than_that_of_a_distance():
    one, other = Landscape([10.0, 11.0]).measure([0, 1], 900)
    assert difference_error(one, other) < 0.5 * one.error


def test_one_candidate_is_measured_once():
    landscape = Landscape([10.0])
    rungs = search([1.0], plan_rungs(900, 100), 0.35, landscape.measure)
    assert [rung.kept for rung in rungs] == [(0,)]
    assert landscape.calls == [([0], 100)]


def test_no_more_is_spent_than_the_budget_even_if_all_are_equal():
    landscape = Landscape([10.0] * 20)
    rungs = search([1.0] * 20, plan_rungs(900, 100), 0.35, landscape.measure)
    assert rungs[-1].spent <= 0.35
    assert len(rungs) == 3


@pytest.mark.parametrize("count", [2, 3, 4, 6, 9, 20])
@pytest.mark.parametrize("multiple", [1, 20])
def test_the_budget_is_spent_where_candidates_are_close(count, multiple):
    landscape = Landscape([10.0] * count, seed=count)
    costs = [1.0 + (number % 2) for number in range(count)]
    rungs = search(costs, plan_rungs(900, multiple), 0.35, landscape.measure, multiple)
    assert 0.25 < rungs[-1].spent <= 0.35
    assert rungs[-1].spent == pytest.approx(cost_of(rungs, costs, 900))
    assert len(rungs[-1].measured) > 1 and len(rungs[-1].kept) == 1
    assert all(rung.num_samples % multiple == 0 for rung in rungs)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_a_small_search_is_about_as_good_as_equal_shares_of_its_budget(count):
    """Equal shares are hard to beat where there is nothing to drop early."""
    found = equal = 0
    for seed in range(80):
        landscape = Landscape([11.0] * (count - 1) + [10.0], seed=seed)
        best = count - 1
        found += search([1.0] * count, plan_rungs(900, 1), 0.35, landscape.measure)[-1].kept == (best,)
        equal += np.argmin([each.value for each in landscape.measure(range(count), 315)]) == best
    assert found >= equal - 6  # two standard errors of the difference, which are mostly shared


@pytest.mark.parametrize(
    ("num_samples", "multiple", "expected"),
    [(50_000, 100, [5_500, 16_600, 50_000]), (1_000, 100, [100, 300, 1_000]), (200, 100, [100, 200]), (90, 100, [90])],
)
def test_rungs_are_thirds_in_whole_shards(num_samples, multiple, expected):
    assert plan_rungs(num_samples, multiple) == expected
