"""The rule of new fields: what is not set leaves identities, parameters and protocol ids as they were without it."""

import dataclasses
import inspect
import json
import typing
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import storage
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from evaluation.protocol import EvaluationProtocol
from pipelines.artifacts import Artifact, differences, digest_of, settings_identity
from pipelines.config.autoencoder_training import AUTOENCODER_DEFAULTS, AutoencoderTrainConfig
from pipelines.config.encode import EncodeConfig
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.lora import LoraConfig
from pipelines.config.model import OBJECTIVE_DEFAULTS, ModelConfig, ObjectiveConfig
from pipelines.config.reader import ALWAYS_RECORDED, resolved
from pipelines.config.recipe import AutoencoderConfig, ImagesConfig, Recipe
from pipelines.config.start import StartConfig
from pipelines.config.training import NON_IDENTITY_FIELDS, TrainConfig
from pipelines.tracking.run_log import flatten
from pipelines.training.starting.identity import train_identity, training_artifact

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "707a9da"
PROTOCOL = EvaluationProtocol(decoder="d", extractor="e", extractor_sha256="s", reference_digest="r")


def with_new_fields(config):
    """The same values in a class of a later version, which has two more optional fields."""
    more = [("new_none", str | None, None), ("new_tuple", tuple[str, ...], ())]
    later = dataclasses.make_dataclass(
        f"Later{type(config).__name__}", more, bases=(type(config),), frozen=True, kw_only=True
    )
    return later(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


RECIPE = Recipe(
    name="n",
    output="o",
    images=ImagesConfig(path="digits", size=32),
    autoencoder=AutoencoderConfig(train=AutoencoderTrainConfig()),
    encode=EncodeConfig(),
    model=ModelConfig(name="DiT-S/2"),
    objective=ObjectiveConfig(),
    train=TrainConfig(),
    evaluate=EvaluateConfig(),
)


def later_recipe(**changes):
    """RECIPE of a version in which every section, and the recipe, has two more optional fields."""
    sections = {
        field.name: with_new_fields(value)
        for field in dataclasses.fields(RECIPE)
        if dataclasses.is_dataclass(value := getattr(RECIPE, field.name))
    }
    trained = with_new_fields(RECIPE.autoencoder.train)
    sections["autoencoder"] = dataclasses.replace(sections["autoencoder"], train=trained)
    return dataclasses.replace(with_new_fields(RECIPE), **sections, **changes)


def test_new_fields_that_are_not_set_are_in_no_recorded_recipe():
    assert json.dumps(resolved(later_recipe())) == json.dumps(resolved(RECIPE))
    assert digest_of(resolved(later_recipe())) == digest_of(resolved(RECIPE))
    assert resolved(later_recipe(new_tuple=("a",))) == {**resolved(RECIPE), "new_tuple": ("a",)}


@pytest.mark.parametrize("config", [RECIPE.train, RECIPE.autoencoder.train], ids=lambda config: type(config).__name__)
def test_new_fields_of_training_are_in_its_identity_only_where_they_are_set(config):
    before = settings_identity(config, NON_IDENTITY_FIELDS)
    later = with_new_fields(config)
    assert settings_identity(later, NON_IDENTITY_FIELDS) == before
    changed = dataclasses.replace(later, new_none="x", new_tuple=("a", "b"))
    assert differences(before, settings_identity(changed, NON_IDENTITY_FIELDS)) == [
        'new_none: null -> "x"',
        'new_tuple: null -> ["a", "b"]',
    ]


def test_new_fields_that_are_not_set_leave_a_training_where_it_is():
    latents = type("Latents", (), {"fingerprint": "f"})()
    assert json.dumps(train_identity(later_recipe(), latents)) == json.dumps(train_identity(RECIPE, latents))
    model = dataclasses.replace(with_new_fields(RECIPE.model), new_none="x")
    changed = differences(train_identity(RECIPE, latents), train_identity(later_recipe_with(model), latents))
    assert changed == ['model.new_none: null -> "x"']


def later_recipe_with(model):
    return dataclasses.replace(later_recipe(), model=model)


def test_a_recorded_null_and_a_missing_field_are_equal():
    assert differences({"a": None, "b": {"c": None}}, {"b": {}}) == []
    assert differences({}, {"a": None}) == []


LORA = {"start": StartConfig(checkpoint="base"), "lora": LoraConfig()}


@pytest.mark.parametrize(
    ("config", "repeated", "recorded"),
    [
        (RECIPE.autoencoder.train, {"reconstruction": "mse", "dtype": "float32"}, None),
        (RECIPE.autoencoder.train, {"compile": False, "on_nonfinite": "stop", "max_skipped": 3}, {}),
        (RECIPE.autoencoder.train, {"perceptual_network": "efficientnet-lite0", "perceptual_weight": 1.0}, None),
        (RECIPE.autoencoder.train, {"adversarial_weight": 0.5, "adversarial_start": 0}, None),
        (RECIPE.autoencoder.train, {"decoder_only": False}, None),
        (RECIPE.train, {"lr_multipliers": {}, "layer_decay": 1.0}, None),
        (
            RECIPE.train,
            LORA | {"lora": LoraConfig(rank=16, alpha=16.0, targets=("attention",))},
            {"lora": {"rank": 16, "alpha": 16.0, "targets": ["attention"]}},
        ),
        (
            RECIPE.train,
            LORA | {"lora": LoraConfig(rank=4, alpha=4.0)},
            {"lora": {"rank": 4, "alpha": 4.0, "targets": []}},
        ),
    ],
)
def test_a_field_that_repeats_its_default_is_as_if_it_was_left_out(tmp_path, config, repeated, recorded):
    """recorded: what earlier releases recorded; None: the fields as they were given."""
    explicit = dataclasses.replace(config, **repeated)
    defaults = config.defaults if (is_training := config is RECIPE.train) else AUTOENCODER_DEFAULTS
    left_out = dataclasses.replace(config, **{k: v for k, v in repeated.items() if k not in {*defaults, "lora"}})
    if "lora" in repeated:
        left_out = dataclasses.replace(left_out, lora=LoraConfig(rank=repeated["lora"].rank))
        defaults = left_out.defaults
    assert explicit == left_out
    identity = {"settings": settings_identity(explicit, (*NON_IDENTITY_FIELDS, "start"))}
    assert identity == {"settings": settings_identity(left_out, (*NON_IDENTITY_FIELDS, "start"))}
    older = {"settings": identity["settings"] | (repeated if recorded is None else recorded)}
    older["settings"].pop("start", None)
    (tmp_path / "plan.json").write_text(json.dumps({"identity": older}))
    artifact = Artifact("train" if is_training else "autoencoder", str(tmp_path), identity, {"settings": defaults})
    assert artifact.changes() == []


@pytest.mark.parametrize(
    ("section", "required", "repeated", "other"),
    [
        (
            "objective",
            {},
            {"schedule": "linear", "prediction": "eps", "variance": "learned_range", "weighting": "none"},
            {"schedule": "cosine"},
        ),
        ("objective", {"kind": "flow"}, {"time": "uniform"}, {"time": "logit_normal"}),
        ("objective", {"weighting": "min_snr"}, {"min_snr_gamma": 5.0}, {"min_snr_gamma": 4.0}),
        ("model", {}, {"qk_norm": False, "norm": "layer", "mlp": "gelu"}, {"qk_norm": True}),
        ("model", {}, {"position": "sincos", "timestep_frequency_shift": 0}, {"position": "rope"}),
    ],
)
def test_a_training_whose_recipe_repeats_a_default_goes_on(tmp_path, section, required, repeated, other):
    def artifact(**given):
        changed = {section: dataclasses.replace(getattr(RECIPE, section), **required, **given)}
        if "kind" in required:
            changed["evaluate"] = EvaluateConfig(sampler="euler")
        recipe = dataclasses.replace(RECIPE, output=str(tmp_path), **changed)
        return training_artifact(recipe, SimpleNamespace(fingerprint="f"))

    explicit, left_out = artifact(**repeated), artifact()
    for earlier, later in ((explicit, left_out), (left_out, explicit)):
        storage.write_json_atomically(str(tmp_path / "checkpoints" / "plan.json"), {"identity": earlier.identity})
        assert later.changes() == [] and len(artifact(**other).changes()) == 1


def test_defaults_of_the_objective_are_those_of_the_processes():
    found = {
        name: parameter.default
        for process in (GaussianDiffusion, FlowMatching)
        for name, parameter in inspect.signature(process).parameters.items()
    }
    assert OBJECTIVE_DEFAULTS.items() <= found.items()


def test_fields_that_are_not_set_are_no_parameters_of_a_run():
    layout = {"encode.memory_format": "channels_last"}  # recorded before it was the default of CPUs alone
    assert flatten(dataclasses.asdict(later_recipe())) | layout == flatten(resolved(RECIPE))
    flat = flatten(resolved(RECIPE))
    assert not {"images.class_names", "train.ema_sigma_rels", "train.keep_last"} & flat.keys()
    assert flatten({"a": (), "b": None, "c": {}, "d": 0, "e": "", "f": (1,)}) == {"d": "0", "e": "", "f": "(1,)"}


def test_a_new_field_of_the_protocol_changes_its_id_only_where_it_is_set():
    later = with_new_fields(PROTOCOL)
    assert later.to_dict() == PROTOCOL.to_dict() and later.protocol_id == PROTOCOL.protocol_id
    assert type(later).from_dict(PROTOCOL.to_dict()) == later  # a report that is older than the fields
    changed = dataclasses.replace(later, new_none="x", new_tuple=("a",))
    assert changed.protocol_id != PROTOCOL.protocol_id
    assert type(later).from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def optional_fields(cls, prefix=""):
    """Dotted names of the fields of a recipe that are None or () when left out."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.default is None or field.default == ():
            yield f"{prefix}{field.name}"
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(hint):
                yield from optional_fields(hint, f"{prefix}{field.name}.")


def recorded_names(content, prefix=""):
    """Dotted names in a recorded recipe."""
    for name, value in content.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from recorded_names(value, f"{prefix}{name}.")


def all_fields(cls, prefix=""):
    """Dotted names of all fields of a recipe, with those that are None or () when left out marked."""
    hints, optional = typing.get_type_hints(cls), set(optional_fields(cls))
    for field in dataclasses.fields(cls):
        yield f"{prefix}{field.name}", field.name in optional
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(hint):
                yield from all_fields(hint, f"{prefix}{field.name}.")


@pytest.fixture(scope="module")
def older_report():
    """The report that commit 707a9da wrote."""
    with zipfile.ZipFile(GOLDEN / "artifacts.zip") as golden:
        (name,) = (name for name in golden.namelist() if name.endswith("/report.json"))
        return json.loads(golden.read(name))


@pytest.fixture(scope="module")
def older_recipe():
    """The resolved recipe that a checkpoint of commit 707a9da records."""
    with zipfile.ZipFile(GOLDEN / "artifacts.zip") as golden:
        name = next(name for name in golden.namelist() if "checkpoints/step_" in name and name.endswith("config.json"))
        return json.loads(golden.read(name))["recipe"]


def test_every_field_of_a_recipe_since_707a9da_is_unset_when_left_out(older_recipe):
    older = set(recorded_names(older_recipe))
    later = {name: is_optional for name, is_optional in all_fields(Recipe) if name not in older}
    assert {"random", "train.validate_every", "evaluate.reconstructions"} <= later.keys()
    assert [name for name, is_optional in later.items() if not is_optional] == []
    assert set(recorded_names(resolved(RECIPE))) <= older


def test_every_field_of_the_protocol_since_707a9da_is_unset_when_left_out(older_report):
    later = [field for field in dataclasses.fields(EvaluationProtocol) if field.name not in older_report["protocol"]]
    assert {"random", "dtype"} <= {field.name for field in later}
    assert [field.name for field in later if field.default is not None and field.name != "dtype"] == []
    assert PROTOCOL.to_dict().keys() == older_report["protocol"].keys()


def test_the_closed_list_names_fields_that_there_are():
    assert set(optional_fields(Recipe)) >= ALWAYS_RECORDED
