"""The placement of workers: recipe fields that reach Ray's calls, and that results do not depend on."""

import inspect

import pytest
from tiny import RECIPE

from pipelines.artifacts import settings_identity
from pipelines.config.reader import RecipeError, load_recipe
from pipelines.config.training import NON_IDENTITY_FIELDS, TrainConfig
from pipelines.scoring.workers.actor_pool import PoolWorker
from pipelines.training.group.run_workers import _scaling_config

ASKED = (
    "train.gpus_per_worker=1",
    'train.accelerator_type="H100"',
    'train.label_selector={"ray.io/market-type" = "!spot"}',
    "encode.label_selector.pool=cheap",
)
WANTED = {"accelerator_type": "H100", "label_selector": {"ray.io/market-type": "!spot"}}


def test_a_recipe_places_the_workers_of_each_stage():
    config = load_recipe(RECIPE, ASKED)
    assert config.train.placement == WANTED
    assert config.encode.placement == {"label_selector": {"pool": "cheap"}}
    assert config.evaluate.placement == {}


def test_ray_train_is_given_the_placement():
    scaling = _scaling_config(load_recipe(RECIPE, ASKED).train)
    assert (scaling.accelerator_type, scaling.label_selector) == ("H100", WANTED["label_selector"])
    assert scaling._resources_per_worker_not_none == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    plain = _scaling_config(load_recipe(RECIPE).train)
    assert (plain.accelerator_type, plain.label_selector) == (None, None)


def test_ray_data_takes_a_placement_by_these_names():
    import ray.data

    assert WANTED.keys() <= inspect.signature(ray.data.Dataset.map).parameters.keys()


def test_actors_take_a_placement_by_these_names():
    import ray

    assert ray.remote(PoolWorker).options(**WANTED)
    with pytest.raises(ValueError):
        ray.remote(PoolWorker).options(place="cheap")


def test_results_do_not_depend_on_the_placement():
    plain, placed = TrainConfig(), TrainConfig(gpus_per_worker=1, **WANTED)
    assert settings_identity(plain, NON_IDENTITY_FIELDS) == settings_identity(placed, NON_IDENTITY_FIELDS)
    assert not WANTED.keys() & settings_identity(plain, NON_IDENTITY_FIELDS).keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('encode.accelerator_type="L4"', "encode.accelerator_type: found 'L4' with gpus_per_worker = 0"),
        ('train.accelerator_type="L4"', "train.accelerator_type: found 'L4' with gpus_per_worker = 0"),
        ('evaluate.accelerator_type="L4"', "evaluate.accelerator_type: found 'L4' with gpus_per_worker = 0"),
        ("train.label_selector.pool=in(a", "train.label_selector.pool: found pool = 'in(a', expected a value"),
        ("train.label_selector=spot", "train.label_selector: found 'spot' (str), expected a section"),
    ],
)
def test_an_impossible_placement_is_refused(override, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(RECIPE, (override,))
    assert message in str(refused.value)
