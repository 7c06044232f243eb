"""Every relative path in a recipe is refused for a job on another machine that does not have it."""

import dataclasses
import typing

import pytest
from tiny import RECIPE as TINY

from cluster.job_package import Package
from pipelines.cli.submission.paths import refuse_unreachable, relative_recipe_paths
from pipelines.config.reader import load_recipe
from pipelines.config.recipe import AutoencoderConfig, Recipe
from raydit.errors import InvalidInput

WRITTEN = {"output", "encode.output", "tracking.uri"}
"""Where a job writes: never a path in its own folder, which is removed at its end."""
READ = {
    "images.path",
    "images.validation",
    "autoencoder.id",
    "autoencoder.train.start",
    "train.start.checkpoint",
    "evaluate.autoguidance",
    "evaluate.extractor_weights",
    "evaluate.reference",
}
NO_PATHS = {
    "name",
    *(f"images.{name}" for name in ("split", "subset", "image_column", "label_column", "class_names", "classes")),
    *(
        f"{section}.{name}"
        for section in ("autoencoder.train", "encode", "train", "evaluate")
        for name in ("accelerator_type", "label_selector")
    ),
    "model.name",
    *(f"train.{name}" for name in ("start.model", "start.freeze", "lora.targets", "lr_multipliers", "keep_best")),
    *(f"evaluate.{name}" for name in ("sampler", "weights", "extractor", "extractors")),
    *(f"evaluate.autoguidance_{name}" for name in ("model", "weights")),
}


def text_fields(section, prefix=""):
    """Yield the dotted names of all fields of a dataclass, and of those in it, that may hold text."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        for kind in kinds_in(hints[field.name]):
            if dataclasses.is_dataclass(kind):
                yield from text_fields(kind, f"{prefix}{field.name}.")
            elif kind is str:
                yield prefix + field.name


def kinds_in(hint):
    if typing.get_origin(hint) is typing.Literal:
        return
    yield hint
    for argument in typing.get_args(hint):
        yield from kinds_in(argument)


def recipe_with(paths):
    """Return the tiny recipe with some paths by field."""
    values = {field: f"sqlite:///{path}" if field == "tracking.uri" else path for field, path in paths.items()}
    id = values.pop("autoencoder.id", None)
    config = load_recipe(
        TINY, ("images.held_out=0", "evaluate.cfg_scale=2", *(f"{field}={value}" for field, value in values.items()))
    )
    return dataclasses.replace(config, autoencoder=AutoencoderConfig(id=id)) if id else config


def test_every_field_that_holds_text_is_a_path_or_is_none():
    assert set(text_fields(Recipe)) == WRITTEN | READ | NO_PATHS


@pytest.mark.parametrize("fields", [WRITTEN | READ - {"autoencoder.id"}, {"autoencoder.id"}], ids=["most", "id"])
def test_relative_paths_are_refused_on_another_machine(tmp_path, monkeypatch, fields):
    monkeypatch.chdir(tmp_path)
    for field in fields:
        (tmp_path / "here" / field).mkdir(parents=True)
    config = recipe_with({field: f"here/{field}" for field in fields})
    relative = relative_recipe_paths(config)
    everything = Package(files={f"here/{field}/file": tmp_path for field in fields})
    for field in fields:
        prefix = "sqlite:///" if field == "tracking.uri" else ""
        assert relative[field] == f"{prefix}here/{field}"
        with pytest.raises(InvalidInput, match=f"^{field}: found '{relative[field]}', a path on this machine"):
            refuse_unreachable(field, relative[field], Package(files={}))
        if field in WRITTEN:
            with pytest.raises(InvalidInput):
                refuse_unreachable(field, relative[field], everything)
        else:
            refuse_unreachable(field, relative[field], everything)


def test_ids_of_autoencoders_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for field in ("autoencoder.id", "autoencoder.train.start"):
        config = recipe_with({field: "stabilityai/sd-vae-ft-ema"})
        assert field not in relative_recipe_paths(config)


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_data_set_on_the_hub_stays_unless_a_folder_has_its_name(tmp_path, monkeypatch, revision):
    monkeypatch.chdir(tmp_path)
    config = recipe_with({"images.path": f"ylecun/mnist{revision}"})
    assert "images.path" not in relative_recipe_paths(config)
    (tmp_path / f"ylecun/mnist{revision}").mkdir(parents=True)
    assert relative_recipe_paths(config)["images.path"] == f"ylecun/mnist{revision}"


def test_a_data_set_that_the_recipe_looks_for_on_the_hub_stays_beside_a_folder_of_its_owner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ylecun").mkdir()
    config = recipe_with({"images.path": "ylecun/mnist", "images.format": "huggingface"})
    assert "images.path" not in relative_recipe_paths(config)
