"""Which images a reference keeps the features of depends on the listing, not on the size of the shards."""

import numpy as np
import pytest
from tiny import tiny_recipe

from pipelines.images.listing import Listing
from pipelines.scoring.real_images import even_spacing, references
from pipelines.scoring.real_images.even_spacing import EvenSpacing
from pipelines.scoring.real_images.references import compute_reference
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.records import ShardResult
from pipelines.scoring.workers.shards import make_shards, split_listing

ROWS, DIM = 37, 3
UNREADABLE = {0, 5, 6, 7, 8, 20, 36}


def reference_by(shard_rows, folder, settings, unreadable):
    """The reference of ROWS images in shards of some size; the features of an image follow from its position."""
    listing = Listing([f"{n:02}" for n in range(ROWS)], np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int64), ())
    features = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    shards = make_shards(str(folder / str(shard_rows)), split_listing(listing, shard_rows))
    for shard in shards:
        positions = [int(key) for key in shard.images.keys]
        good = [position for position in positions if position not in unreadable]
        missing = np.array([f"{n:02}" for n in positions if n in unreadable], dtype=str)
        ShardResult(features=features[good] if good else None, unreadable=missing).write(shard.file)
    return compute_reference(settings, listing, shards)


@pytest.mark.parametrize("run", [8, 500])
@pytest.mark.parametrize("unreadable", [set(), UNREADABLE], ids=["all readable", "some unreadable"])
def test_a_reference_keeps_the_same_images_whatever_the_size_of_shards(tmp_path, monkeypatch, run, unreadable):
    monkeypatch.setattr(references, "MAX_REFERENCE_FEATURES", 10)
    monkeypatch.setattr(even_spacing, "SPACING_ROWS", run)
    settings = ScoringSettings.from_recipe(tiny_recipe(tmp_path))
    found = {rows: reference_by(rows, tmp_path, settings, unreadable) for rows in (2, 4, 6, 37)}
    runs = [[n for n in range(start, min(start + run, ROWS)) if n not in unreadable] for start in range(0, ROWS, run)]
    expected = [f"{n:02}" for part in runs for n in part[::4]]
    for reference in found.values():
        assert reference.keys.tolist() == expected
        assert np.array_equal(reference.features, found[ROWS].features)
        assert reference.n == ROWS - len(unreadable)


@pytest.mark.parametrize("rows", [100, 500])
def test_the_images_of_earlier_references_are_kept_by_the_shipped_recipes(rows):
    """CIFAR-10's shards have 100 images and every fifth was kept of each, ImageNet's 500 and every 129th."""
    stride, rng, spacing = (
        (5, None, EvenSpacing(5)) if rows == 100 else (129, np.random.default_rng(0), EvenSpacing(129))
    )
    for _ in range(11):
        readable = np.arange(rows) if rng is None else np.flatnonzero(rng.random(rows) > 0.1)
        assert np.array_equal(readable[spacing.choose(readable, rows)], readable[::stride])


@pytest.mark.parametrize("stride", [500, 501, 1300])
@pytest.mark.parametrize("rows", [77, 500, 900])
def test_a_stride_longer_than_a_run_bounds_the_number_of_images(stride, rows):
    total, spacing = 9000, EvenSpacing(stride)
    readable = np.flatnonzero(np.random.default_rng(0).random(total) > 0.1) if stride > 500 else np.arange(total)
    kept: list[int] = []
    for start in range(0, total, rows):
        count = min(rows, total - start)
        part = readable[(readable >= start) & (readable < start + count)]
        kept += part[spacing.choose(part - start, count)].tolist()
    assert kept == readable[::stride].tolist()
