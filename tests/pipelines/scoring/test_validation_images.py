"""Held-out images of their own (images.validation) as the real baseline."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_recipe, write_images

from evaluation.extractors import Features
from pipelines.images.open import with_absolute_paths
from pipelines.images.preprocess import read_cropped
from pipelines.scoring.protocols.build_protocol import images_protocol
from pipelines.scoring.real_images.reconstructions import Reconstructions
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.actors import ScoringActor
from pipelines.scoring.workers.records import read_results


def mean_colours(images: torch.Tensor) -> Features:
    """An extractor that tells images apart. images: uint8 (N, 3, H, W)."""
    return Features(images.float().mean(dim=(2, 3)).numpy())


@pytest.fixture
def real(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.extractors.create_extractor", lambda *arguments, **options: mean_colours)
    other = write_images(tmp_path / "other", per_class=3)
    config = tiny_recipe(tmp_path, "images.held_out=0", f"images.validation={other}", "evaluate.reconstructions=true")
    return RealImages.of(ScoringSettings.from_recipe(config)), other


def test_held_out_images_are_read_from_their_own_source(real):
    real, other = real
    assert (len(real.training), len(real.held_out)) == (37, 10)
    actor = ScoringActor(with_absolute_paths(real.settings.images), real.settings.evaluate)
    for listing, path in ((real.held_out, str(other)), (real.training, real.settings.images.path)):
        shards = real.shards(listing)
        for shard in shards:
            actor(shard)
        for shard, record in zip(shards, read_results(shards), strict=True):
            source = replace(real.settings.images, path=path, validation=None)
            pixels, _, errors = read_cropped(source, shard.images.keys)
            assert record.unreadable.tolist() == sorted(errors)
            expected = mean_colours(torch.from_numpy(pixels).permute(0, 3, 1, 2)).features
            assert record.features.tobytes() == expected.tobytes()


def test_they_are_the_ones_that_are_reconstructed(real):
    real, _ = real
    shards = Reconstructions(real, num_samples=8, decoder="aa").missing_shards()
    assert all(shard.held_out and shard.reconstruct for shard in shards)
    keys = [key for shard in shards for key in shard.images.keys]
    assert len(keys) == 8 and set(keys) <= set(real.held_out.keys)


@pytest.mark.parametrize(("wanted", "count"), [(True, 8), (None, 8), (False, 0)])
def test_they_are_reconstructed_unless_they_are_not_wanted(real, wanted, count):
    real, _ = real
    evaluate = replace(real.settings.evaluate, reconstructions=wanted)
    chosen = replace(real, settings=replace(real.settings, evaluate=evaluate))
    assert len(Reconstructions(chosen, num_samples=8, decoder="aa").listing) == count


def test_the_reference_is_that_of_all_training_images(real, tmp_path):
    real, _ = real
    without = RealImages.of(ScoringSettings.from_recipe(tiny_recipe(tmp_path, "images.held_out=0")))
    assert real.digest(real.training) == without.digest(without.training)
    assert len({real.path(listing) for listing in (real.training, real.held_out)}) == 2


def test_a_protocol_holds_the_images_for_validation_only_where_they_are_named(real, tmp_path):
    """Otherwise a report would keep the real baseline of other images."""
    real, other = real
    protocol = images_protocol(real.settings, 20)
    assert protocol.validation_digest == real.digest(real.held_out)
    (other / "ring" / "000.png").unlink()
    changed = images_protocol(real.settings, 20)
    assert changed.protocol_id != protocol.protocol_id and changed.reference_digest == protocol.reference_digest
    without = images_protocol(ScoringSettings.from_recipe(tiny_recipe(tmp_path, "images.held_out=0")), 20)
    assert "validation_digest" not in without.to_dict()
    assert replace(protocol, validation_digest=None).protocol_id == without.protocol_id
