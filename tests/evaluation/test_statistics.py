"""Streaming and merging give what one pass over everything gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics import inception_score
from evaluation.statistics import FeatureStatistics, InceptionScoreSums

DIM = 5


def statistics_of(features):
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def cut(values, bounds):
    return [part for part in np.split(values, sorted(bounds)) if len(part)]


@given(st.integers(2, 60), st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_merging_in_any_order_and_grouping_equals_the_whole(n, bounds, random):
    features = np.random.RandomState(n).randn(n, DIM) * 3 + 100
    parts = [statistics_of(part) for part in cut(features, [min(b, n) for b in bounds])]
    while len(parts) > 1:  # merge two at random until one is left
        random.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    whole = parts[0]
    assert whole.n == n
    np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(whole.cov, np.cov(features, rowvar=False), rtol=1e-11, atol=1e-11)


def test_statistics_of_float32_far_from_zero_keep_their_digits():
    features = (np.random.RandomState(0).randn(4000, 3) + 1e4).astype(np.float32)
    statistics = FeatureStatistics(3)
    for part in np.array_split(features, 17):
        statistics.update(part)
    np.testing.assert_allclose(statistics.cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)


def test_merging_leaves_the_other_as_it_was():
    left, right = statistics_of(np.eye(3)), statistics_of(np.ones((4, 3)))
    left.merge(right)
    assert left.n == 7 and right.n == 4 and (right.mean == 1).all()


def test_merging_into_empty_statistics_gives_the_other():
    other = statistics_of(np.random.RandomState(0).randn(9, DIM))
    merged = FeatureStatistics(DIM).merge(other)
    assert merged.n == 9
    np.testing.assert_array_equal(merged.mean, other.mean)
    np.testing.assert_array_equal(merged.cov, other.cov)


def test_wrong_shapes_values_and_counts_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \(N, 5\)"):
        FeatureStatistics(DIM).update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="1 of 3 rows.*first: row 1.*expected finite"):
        FeatureStatistics(2).update(np.array([[0, 0], [np.nan, 0], [0, 0]]))
    with pytest.raises(ValueError, match="1 samples, expected at least 2"):
        _ = statistics_of(np.zeros((1, 2))).cov
    with pytest.raises(ValueError, match="statistics of 3 features, expected 2"):
        FeatureStatistics(2).merge(FeatureStatistics(3))


@given(st.integers(10, 80), st.lists(st.integers(0, 80), max_size=5), st.integers(0, 1000))
@settings(deadline=None)
def test_streamed_inception_score_equals_the_stored_one(n, bounds, seed):
    rng = np.random.RandomState(seed)
    logits = rng.randn(n, 7).astype(np.float32) * 4
    total = InceptionScoreSums(n, 7)
    for part in cut(rng.permutation(n), [min(b, n) for b in bounds]):
        sums = InceptionScoreSums(n, 7)
        sums.update(part, logits[part])
        total.merge(sums)
    np.testing.assert_allclose(total.score(), inception_score(logits), rtol=1e-12, atol=1e-13)


def stored_inception_score(logits, splits=10):
    """The definition, over chunks of a permutation."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    p = p[np.random.RandomState(2020).permutation(len(p))]
    scores = []
    for i in range(splits):
        chunk = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        scores.append(np.exp((chunk * (np.log(chunk) - np.log(chunk.mean(axis=0)))).sum(axis=1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n", [10, 1003])
def test_streamed_inception_score_is_the_definition(n):
    logits = np.random.RandomState(n).randn(n, 50).astype(np.float32) * 3
    sums = InceptionScoreSums(n, 50)
    for part in np.array_split(np.random.RandomState(1).permutation(n), 7):
        sums.update(part, logits[part])
    assert len(sums) == n
    np.testing.assert_allclose(sums.score(), stored_inception_score(logits), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 4], r"2 rows for indices \[3, 4\], of which 1 were added before"),  # a shard that overlaps another
        ([4, 4], r"2 rows for indices \[4, 4\], of which 0"),
        ([18, 19, 20, 21], r"4 rows for indices \[18, 19, 20\]\.\.\..*below 20"),  # the padding of a last batch
        ([-1], r"1 rows for indices \[-1\]"),
    ],
)
def test_an_index_counts_once(indices, message):
    sums, part = InceptionScoreSums(20, 3), InceptionScoreSums(20, 3)
    sums.update(np.arange(4), np.zeros((4, 3)))
    with pytest.raises(ValueError, match=message + ".*Add every index once"):
        sums.update(np.array(indices), np.zeros((len(indices), 3)))
    part.update(np.arange(3, 6), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="3 rows .* 1 were added before"):
        sums.merge(part)


def test_inception_score_sums_refuse_missing_samples_and_foreign_parts():
    sums = InceptionScoreSums(20, 3)
    sums.update(np.arange(19), np.zeros((19, 3)))
    with pytest.raises(ValueError, match="Found 19 samples.*expected 20.*every index exactly once"):
        sums.score()
    with pytest.raises(ValueError, match="21 samples and 3 logits, expected 20 and 3"):
        sums.merge(InceptionScoreSums(21, 3))
    with pytest.raises(ValueError, match="5 samples, expected at least one for each of 10 splits"):
        InceptionScoreSums(5, 3)
