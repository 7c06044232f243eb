"""What a training of an adapter, or of a part of the parameters, keeps for the backward pass, against torch."""

import pytest
from model_fields import SMALL
from saved_tensors import saved_bytes
from tiny_partial_training import CASES, TRAININGS, partial_network, partial_settings

from dit.config import config_from_dict, named_config
from pipelines.config.training import TrainConfig
from pipelines.planning.activations import activation_bytes, cast_bytes
from pipelines.planning.memory import sampling_bytes, train_memory

OF_THE_PAPER = [(fields, training) for fields, training in CASES if not fields]


def torch_bytes(config, settings, dtype):
    """Return what torch keeps for each image, and what it keeps once."""
    network = partial_network(config, settings)
    two, four = (saved_bytes(network, config, images, dtype) for images in (2, 4))
    return (four - two) / 2, 2 * two - four


@pytest.mark.parametrize(("fields", "training"), CASES, ids=str)
def test_a_partial_training_keeps_what_torch_keeps(fields, training):
    config, settings = config_from_dict(SMALL | fields), partial_settings(**training)
    kept, _ = torch_bytes(config, settings, "float32")
    assert activation_bytes(config, "float32", settings) == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize(("fields", "training"), OF_THE_PAPER, ids=str)
def test_under_autocast_a_partial_training_keeps_what_torch_keeps(fields, training):
    """Biases and factors have no part in the copies of weights that are planned, which are also those of modulations
    whose condition has no gradient: autocast holds these, but the backward pass does not."""
    config, settings = config_from_dict(SMALL | fields), partial_settings(**training)
    kept, copies = torch_bytes(config, settings, "bfloat16")
    assert activation_bytes(config, "bfloat16", settings) == pytest.approx(kept, rel=0.05)
    modulations = 2 * (6 * SMALL["depth"] + 2) * SMALL["hidden_size"] ** 2
    assert 0.9 * copies < cast_bytes(config, settings) < 1.05 * copies + modulations


@pytest.mark.parametrize("training", ["attention", "upper mlp", "first half and embeddings frozen"])
def test_gradient_checkpointing_keeps_the_inputs_of_the_blocks_that_are_reached(training):
    settings = partial_settings(**TRAININGS[training])
    whole, spared = (config_from_dict(SMALL | {"gradient_checkpointing": on}) for on in (False, True))
    inputs, _ = torch_bytes(spared, settings, "float32")
    blocks = 6 if training == "attention" else 3
    one_block = (activation_bytes(whole, settings=settings) - activation_bytes(spared, settings=settings)) / (
        blocks - 1
    )
    assert activation_bytes(spared, settings=settings) == pytest.approx(inputs + one_block, rel=0.15)


def test_a_training_of_the_final_layer_alone_takes_what_a_pass_without_gradients_takes():
    config, common = named_config("DiT-XL/2"), {"global_batch_size": 256, "dtype": "bfloat16"}
    full = train_memory(config, TrainConfig(**common))["activations"]
    settings = partial_settings(**TRAININGS["final layer"], **common)
    final = train_memory(config, settings)["activations"] - cast_bytes(config, settings)
    assert final == 256 * sampling_bytes(config, "bfloat16") < 0.03 * full
