"""Real images are listed once for a job, and again for the next one."""

from dataclasses import replace

import pytest
from tiny import tiny_recipe

from pipelines.scoring.real_images import real_listing
from pipelines.scoring.real_images.real_listing import listed_once
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.settings import ScoringSettings


@pytest.fixture
def settings(tmp_path):
    return ScoringSettings.from_recipe(tiny_recipe(tmp_path))


@pytest.fixture
def listed(monkeypatch):
    """The calls that list images."""
    calls, list_recorded_images = [], real_listing.list_recorded_images

    def listing(*arguments):
        calls.append(arguments)
        return list_recorded_images(*arguments)

    monkeypatch.setattr(real_listing, "list_recorded_images", listing)
    return calls


def test_the_same_images_are_listed_once_for_a_job_and_others_for_themselves(settings, listed):
    with listed_once():
        first = RealImages.of(settings)
        with listed_once():
            again = RealImages.of(replace(settings, seed=8), num_samples=5)
        assert again.training is first.training and again.held_out is first.held_out and again.num_samples == 5
        assert len(listed) == 1
        others = RealImages.of(replace(settings, images=replace(settings.images, held_out=0.5)))
        assert len(others.held_out) > len(first.held_out) and len(listed) == 2
    RealImages.of(settings)
    assert len(listed) == 3


def test_the_next_job_sees_images_that_came_meanwhile(settings, tmp_path, listed):
    for count in (37, 38):
        with listed_once():
            real = RealImages.of(settings)
        assert len(real.training) + len(real.held_out) == count
        (tmp_path / "images" / "blob" / "new.png").write_bytes((tmp_path / "images" / "ring" / "000.png").read_bytes())
