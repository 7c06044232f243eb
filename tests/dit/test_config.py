import dataclasses
import json
import subprocess
import sys

import pytest

from dit.config import MODEL_NAMES, DiTConfig, config_from_dict, named_config
from dit.sampler_names import SAMPLER_PROCESSES
from raydit.errors import InvalidInput


def test_config_is_read_without_torch():
    code = "import sys, dit.config, dit.formats.record, dit.macs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults_are_dit_xl_2():
    assert DiTConfig() == named_config("DiT-XL/2")


def test_names_are_the_papers_twelve():
    assert MODEL_NAMES[0] == "DiT-S/2" and MODEL_NAMES[-1] == "DiT-XL/8" and len(MODEL_NAMES) == 12


def test_named_config_takes_overrides():
    config = named_config("DiT-B/4", num_classes=10, input_size=(16, 24))
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (12, 768, 12, 4)
    assert (config.num_classes, config.grid_size, config.num_tokens) == (10, (4, 6), 24)


def test_config_survives_json():
    config = named_config("DiT-S/2", input_size=(16, 8), conditioning="in_context")
    assert DiTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_older_name_of_the_dropout_probability_is_the_recorded_one():
    for build in (config_from_dict, lambda fields: named_config("U-ViT-S/2", **fields)):
        new, old = build({"condition_dropout_prob": 0.3}), build({"class_dropout_prob": 0.3})
        assert new == old and new.condition_dropout_prob == 0.3
        assert "condition_dropout_prob" not in dataclasses.asdict(new)
        assert build({"condition_dropout_prob": 0.3, "class_dropout_prob": 0.3}) == new
        with pytest.raises(
            InvalidInput, match="^condition_dropout_prob is 0.3 and class_dropout_prob, .* is 0.1, expec"
        ):
            build({"condition_dropout_prob": 0.3, "class_dropout_prob": 0.1})


def test_null_class_exists_only_with_classes_and_dropout():
    assert DiTConfig(num_classes=10).null_class == 10
    assert DiTConfig(num_classes=10, class_dropout_prob=0).null_class is None
    assert DiTConfig(num_classes=0).null_class is None


def test_a_recorded_config_without_later_fields_is_that_of_the_paper():
    first = {"input_size": [16, 8], "hidden_size": 64, "depth": 2, "num_heads": 4, "learn_sigma": False}
    config = config_from_dict(first)
    assert config == DiTConfig(input_size=(16, 8), hidden_size=64, depth=2, num_heads=4, learn_sigma=False)
    assert (config.qk_norm, config.norm, config.mlp, config.position) == (False, "layer", "gelu", "sincos")


@pytest.mark.parametrize(
    ("content", "found", "expected", "advice"),
    [
        ({"architecture": "vit"}, "architecture is 'vit'", "one of dit, uvit", "did you mean 'uvit'?"),
        (
            {"qknorm": True},
            "qknorm is not a field of a dit model",
            "expected one of input_size",
            "did you mean 'qk_norm'?",
        ),
        (
            {"architecture": "uvit", "learn_sigma": True},
            "learn_sigma is not a field of a uvit",
            "expected one of",
            "Choose",
        ),
    ],
)
def test_an_unknown_recorded_config_is_refused(content, found, expected, advice):
    with pytest.raises(ValueError) as error:
        config_from_dict(content)
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)


def test_every_sampler_has_a_process():
    from dit.samplers import SAMPLERS

    assert SAMPLERS.keys() == SAMPLER_PROCESSES.keys()


@pytest.mark.parametrize(
    ("fields", "found", "expected", "advice"),
    [
        (
            {"patch_size": 3},
            "32x32",
            "both sides to be multiples of patch_size = 3",
            "Choose another patch_size",
        ),
        ({"input_size": (32, 30), "patch_size": 4}, "32x30", "both sides", "Choose another"),
        ({"num_heads": 7}, "hidden_size is 1152", "multiple of num_heads = 7", "Change hidden_size"),
        ({"hidden_size": 18, "num_heads": 3}, "hidden_size is 18", "and of 4", "Change hidden_size"),
        ({"depth": 0}, "depth is 0", "expected a number above 0", "Set depth to a positive number"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0", "expected a number above 0", "Set mlp_ratio to a positive number"),
        ({"num_classes": -1}, "num_classes is -1", "expected 0 or more", "Use 0 for an unconditional"),
        ({"class_dropout_prob": 1.5}, "condition_dropout_prob is 1.5", "[0, 1)", "Use 0.1"),
        ({"conditioning": "adaln-zero"}, "'adaln-zero'", "one of adaln_zero", "did you mean 'adaln_zero'?"),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(fields, found, expected, advice):
    with pytest.raises(ValueError) as error:
        DiTConfig(**fields)
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'DiT-XL/2'"):
        named_config("DiT-XL-2")
    with pytest.raises(ValueError, match="Choose one of them"):
        named_config("resnet")
