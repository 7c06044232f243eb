"""`raydit plan` of a training that starts from a U-ViT, some of whose fields the recipe leaves out."""

from dataclasses import replace

import pytest
from tiny_training import Training, training_recipe

from dit.model import build_model
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.networks import FLOAT32, resolve_networks
from pipelines.planning.plan import Images, make_plan
from pipelines.planning.render import plan_lines
from pipelines.planning.started_networks import resolve_started_networks
from raydit.errors import InvalidInput, NotFound, StorageFailed, Unreachable

UVIT = {"architecture": "uvit", "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
OF_THE_START = {"qkv_bias": True, "mlp_time_embed": True, "final_conv": False}
IMAGES = Images(training=100, held_out=0, classes=3, source="")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The recipe of a finished training of a U-ViT whose optional fields are all other than the defaults."""
    return Training(training_recipe(tmp_path_factory.mktemp("base"), model=UVIT | OF_THE_START, steps=3)).run().recipe


def fine_tuning(base, output, freeze=("time_embed.*",), **model):
    """The recipe of a training from the base. model: fields that the recipe sets."""
    checkpoint = str(CheckpointFolder(base.folder("checkpoints")).newest().path)
    start = {"checkpoint": checkpoint, "reset": ["labels"], "freeze": list(freeze)}
    return training_recipe(output.parent, output, model=UVIT | model, start=start)


def fields(model):
    return {name: getattr(model, name) for name in OF_THE_START}


def test_a_plan_has_the_network_that_is_trained(base, tmp_path):
    recipe = fine_tuning(base, tmp_path / "tuned")
    plan = make_plan(recipe, parse_cluster("1xL4"), IMAGES)
    assert fields(plan.model) == OF_THE_START
    parameters = dict(build_model(plan.model).named_parameters())
    frozen = sum(each.numel() for name, each in parameters.items() if name.startswith("time_embed."))
    total = sum(each.numel() for each in parameters.values())
    (train,) = (stage for stage in plan.stages if stage.stage == "train")
    assert train.memory["weights"] == FLOAT32 * total and train.memory["gradients"] == FLOAT32 * (total - frozen)
    (said,) = (line for line in plan_lines(plan) if line.startswith("start "))
    assert said.endswith(f"{total - frozen:,} of {total:,} parameters are trained")


def test_what_a_recipe_sets_is_planned_as_it_says(base, tmp_path):
    networks = resolve_started_networks(fine_tuning(base, tmp_path / "tuned", final_conv=True), 3)
    assert fields(networks.model) == OF_THE_START | {"final_conv": True}


@pytest.mark.parametrize("error", [NotFound, StorageFailed, Unreachable])
def test_a_start_that_cannot_be_opened_from_here_leaves_the_recipes_own_network(base, tmp_path, monkeypatch, error):
    def find_start(config):
        raise error("the start", "", "")

    monkeypatch.setattr("pipelines.training.starting.find_start.find_start", find_start)
    recipe = fine_tuning(base, tmp_path / "tuned", freeze=())
    assert resolve_started_networks(recipe, 3) == resolve_networks(recipe, 3)


def test_a_start_that_no_training_can_have_is_refused(base, tmp_path):
    recipe = fine_tuning(base, tmp_path / "tuned")
    own = replace(recipe, output=base.output)
    with pytest.raises(InvalidInput, match="which this training would replace"):
        make_plan(own, parse_cluster("1xL4"), IMAGES)


def test_a_start_is_not_opened_where_nothing_is_taken_over(base, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.training.starting.find_start.find_start", lambda config: pytest.fail("was opened"))
    for recipe in (base, fine_tuning(base, tmp_path / "tuned", **OF_THE_START)):
        assert resolve_started_networks(recipe, 3) == resolve_networks(recipe, 3)
    dit = training_recipe(tmp_path, tmp_path / "dit", start={"checkpoint": "nowhere"})
    assert resolve_started_networks(dit, 3) == resolve_networks(dit, 3)
