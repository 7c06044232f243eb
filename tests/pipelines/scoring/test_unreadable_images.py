"""Real images that cannot be read: a few are left out of what samples are compared with, and many are refused."""

import numpy as np
import pytest
from drawn_records import DIM, write_records
from tiny import tiny_recipe

from pipelines.scoring.real_records import read_real_results
from pipelines.scoring.reconstructions import Reconstructions
from pipelines.scoring.records import ShardResult
from pipelines.scoring.references import RealImages, load_real_features
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.shards import find_unfinished
from raydit.errors import InvalidInput


@pytest.fixture
def real_images(tmp_path):
    """List the tiny images, of which about half are held out."""

    def call(*overrides):
        return RealImages.of(ScoringSettings.from_recipe(tiny_recipe(tmp_path, "images.held_out=0.4", *overrides)))

    return call


def finish(shards, unreadable):
    """Write the records of shards in which images with some keys could not be read."""
    for shard in shards:
        missing = sorted({*shard.images.keys} & {*unreadable})
        count = len(shard.images) - len(missing)
        ShardResult(
            features=np.random.default_rng(0).normal(size=(count, DIM)).astype(np.float32) if count else None,
            unreadable=np.array(missing, dtype=str),
        ).write(shard.file)


def test_a_reference_that_would_lack_many_images_is_refused_until_they_are_repaired(real_images, capsys):
    real = real_images()
    lost = real.training.keys[8:19]
    finish(real.missing_shards(), lost)
    with pytest.raises(InvalidInput) as refused:
        load_real_features(real)
    total = len(real.training)
    assert refused.value.found == f"images.path: 11 of {total} images cannot be read, such as {lost[0]}"
    assert refused.value.expected == "at most 10 (encode.max_quarantined = 0.05, and 2 readable)"
    again = find_unfinished(real.missing_shards())
    assert [shard.images.keys[0] for shard in again] == [real.training.keys[8], real.training.keys[16]]
    write_records(again)  # the images were repaired
    assert load_real_features(real)[0].n == total and capsys.readouterr().out == ""


def test_a_reference_says_which_images_it_lacks(real_images, capsys):
    real = real_images()
    lost = real.training.keys[5:8]
    finish(real.missing_shards(), lost)
    assert load_real_features(real)[0].n == len(real.training) - 3
    said = f"3 of {len(real.training)} images cannot be read and are left out of the features by efficientnet-lite0"
    assert f"{said}, such as {lost[0]}" in capsys.readouterr().out
    real = real_images("encode.max_quarantined=0")  # a reference that is there stays valid
    assert real.missing == [] and load_real_features(real)[0].n == len(real.training) - 3


def test_one_unreadable_image_is_too_many_if_none_may_be_quarantined(real_images):
    real = real_images("encode.max_quarantined=0")
    finish(real.missing_shards(), real.training.keys[:1])
    with pytest.raises(InvalidInput, match=r"1 of .* expected at most 0 \(encode.max_quarantined = 0"):
        load_real_features(real)


def test_held_out_images_are_read_again_with_their_reconstructions(real_images):
    real = real_images()
    lost = real.held_out.keys[:11]
    reconstructions = Reconstructions(real, num_samples=8, decoder="aa")
    finish([*real.missing_shards(), *reconstructions.missing_shards()], lost)
    with pytest.raises(InvalidInput, match=rf"11 of {len(real.held_out)} held-out images cannot be read"):
        load_real_features(real)
    assert len(find_unfinished(shards := reconstructions.missing_shards())) == len(shards)
    write_records(find_unfinished([*real.missing_shards(), *reconstructions.missing_shards()]))
    reference, held_out = load_real_features(real)
    assert reference.n == len(real.training) and len(held_out.features) == len(real.held_out)
    assert len(reconstructions.load().features) == 8


def test_a_set_without_enough_readable_images_is_refused(real_images):
    real = real_images()
    shards = real.shards(real.training)[:1]
    finish(shards, shards[0].images.keys[1:])
    with pytest.raises(InvalidInput, match=r"7 of 8 images .* expected at most 6 "):
        list(read_real_results(real.settings, shards, 2))
