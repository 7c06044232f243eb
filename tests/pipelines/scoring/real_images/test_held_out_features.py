"""Which held-out images have features: of very many, only those that the real baseline is of."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.recipe import ImagesConfig
from pipelines.images.listing import Listing
from pipelines.scoring.real_images.references import RealImages, load_real_features
from pipelines.scoring.reports.build_report import spaced_positions
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.records import ShardResult

DIM = 4


def listing_of(prefix, count):
    return Listing([f"{prefix}{k}" for k in range(count)], np.zeros(count, np.int32), np.zeros(count, np.int64), ())


def real_images(folder, num_samples, num_held_out=70):
    evaluate = EvaluateConfig(num_samples=num_samples, shard_rows=8)
    settings = ScoringSettings(
        images=ImagesConfig(path="digits", size=32), evaluate=evaluate, seed=0, output=str(folder), max_quarantined=0.0
    )
    return RealImages(settings, listing_of("t", 40), listing_of("h", num_held_out))


def write_features(shards):
    """Write records whose features follow from the images' keys."""
    for shard in shards:
        seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) for key in shard.images.keys]
        features = np.array([np.random.RandomState(seed).randn(DIM) for seed in seeds], np.float32)
        ShardResult(features=features, unreadable=np.array([], dtype=str)).write(shard.file)


def held_out_features(real):
    write_features(real.missing_shards())
    _, held_out = load_real_features(real)
    assert real.missing == [] and held_out is not None
    return held_out.features


@pytest.mark.parametrize("num_samples", [10, 33, 90])
def test_the_features_are_those_that_the_baseline_would_take_of_all(tmp_path, monkeypatch, num_samples):
    every = held_out_features(real_images(tmp_path / "all", num_samples))
    monkeypatch.setattr("pipelines.scoring.real_images.references.MAX_HELD_OUT_FEATURES", 69)
    found = held_out_features(real_images(tmp_path / "some", num_samples))
    assert len(every) == 70
    np.testing.assert_array_equal(found, every[spaced_positions(70, min(num_samples, 70))])


def test_the_number_of_scored_images_decides_where_the_recipe_has_another(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.scoring.real_images.references.MAX_HELD_OUT_FEATURES", 30)
    real = replace(real_images(tmp_path, 10), num_samples=40)
    assert len(held_out_features(real)) == 40
    assert real.path(real.baseline) != real.path(replace(real, num_samples=50).baseline)


def test_as_many_as_are_allowed_keep_the_file_that_they_had(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.scoring.real_images.references.MAX_HELD_OUT_FEATURES", 70)
    real = real_images(tmp_path, 10)
    assert real.baseline is real.held_out


def test_held_out_images_with_the_names_and_lengths_of_training_images_have_their_own_files(tmp_path):
    """As the files of uncompressed images in the folders of two splits."""
    real = real_images(tmp_path, 10)
    real = replace(real, held_out=replace(real.training, root="other"))
    assert real.digest(real.held_out) == real.digest(real.training)  # ids are of this
    shards = real.missing_shards()
    for shard in shards:
        features = np.random.RandomState(0).randn(len(shard.images), DIM).astype(np.float32) + 100 * shard.held_out
        ShardResult(features=features, unreadable=np.array([], dtype=str)).write(shard.file)
    reference, held_out = load_real_features(real)
    assert len({shard.file for shard in shards}) == len(shards) == 10 and real.missing == []
    assert np.abs(reference.mu).max() < 10 and held_out is not None and held_out.features.min() > 90
    assert sorted(path.name for path in (tmp_path / "references").iterdir()) == sorted(
        [f"{real.digest(real.training)[:12]}{end}.npz" for end in ("", "-held-out")]
    )
