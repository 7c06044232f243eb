"""The memory of a training worker against the tensors that torch allocates."""

import pytest
import torch
from model_fields import SMALL

from dit.config import config_from_dict, named_config
from dit.model import build_model
from dit.train import create_state, train_step
from dit.trained_parameters import freeze
from pipelines.config.lora import LoraConfig
from pipelines.config.reader import validate_recipe
from pipelines.config.start import StartConfig
from pipelines.config.training import TrainConfig
from pipelines.planning.activations import activation_bytes
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.memory import suggest_smaller, train_memory, worker_memory
from pipelines.planning.networks import (
    FLOAT32,
    checkpoint_bytes,
    count_parameters,
    resolve_networks,
)
from pipelines.planning.time import autoencoder_work


@pytest.mark.parametrize("patterns", [(), ("blocks.0.*", "*embed*")])
def test_a_training_state_takes_the_bytes_of_its_tensors(patterns):
    """What is frozen is its own average; the table of positions, which is never trained, is one as well."""
    config = config_from_dict(SMALL)
    start = StartConfig(checkpoint="base", freeze=patterns)
    settings = TrainConfig(steps=1, global_batch_size=4, ema_sigma_rels=(0.05,), start=start)
    network = build_model(config)
    table = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    freeze(network, patterns)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad} - table
    state = create_state(network, settings)
    x, zero = torch.randn(2, config.in_channels, *config.latent_size), torch.zeros(2, dtype=torch.long)
    train_step(state, x, lambda network, x: {"loss": network(x, zero, zero).square().mean()}, settings)
    parameters = list(state.network.parameters())
    moments = [m for tensors in state.optimizer.state.values() for m in tensors.values() if m.ndim]
    averages = [
        tensor
        for average in state.averages.values()
        for name, tensor in average.state_dict().items()
        if name not in frozen
    ]
    assert bool(frozen) == bool(patterns)
    assert train_memory(config, settings) == {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.nbytes for p in parameters if p.requires_grad),
        "moments": sum(m.nbytes for m in moments),
        "averages": sum(tensor.nbytes for tensor in averages),
        "gathered": 0,
        "activations": 4 * activation_bytes(config, settings=settings),
    }


def test_fsdp_divides_the_state_and_gathers_blocks():
    config, parts = named_config("DiT-XL/2"), ("weights", "gradients", "moments", "averages")
    ddp = train_memory(config, TrainConfig(global_batch_size=8, num_workers=8))
    fsdp = train_memory(config, TrainConfig(global_batch_size=8, num_workers=8, strategy="fsdp"))
    assert all(fsdp[part] == ddp[part] / 8 for part in parts)
    assert 3 * FLOAT32 * count_parameters(config).block < fsdp["gathered"] < 0.2 * ddp["weights"]
    assert fsdp["activations"] == ddp["activations"]


def test_fsdp_holds_all_gradients_between_micro_batches():
    """tests/dit/test_distributed.py counts those that torch holds."""
    config, settings = named_config("DiT-XL/2"), {"global_batch_size": 64, "num_workers": 8, "strategy": "fsdp"}
    at_once, two = (train_memory(config, TrainConfig(**settings, accumulation_steps=steps)) for steps in (1, 2))
    assert two["gradients"] == 8 * at_once["gradients"] == FLOAT32 * count_parameters(config).trained
    divided = {"gradients": at_once["gradients"], "activations": 2 * two["activations"]}
    assert two | divided == at_once


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"global_batch_size": 512}, "no setting is enough"),
        ({"global_batch_size": 256, "accumulation_steps": 4}, "--set train.accumulation_steps=1 takes 21.0 GiB"),
    ],
)
def test_micro_batches_are_not_advised_where_they_hold_more_gradients_than_they_save(settings, advice):
    train = {"num_workers": 8, "gpus_per_worker": 1, "dtype": "bfloat16", "strategy": "fsdp"}
    recipe = validate_recipe(
        {
            "name": "n",
            "output": "o",
            "images": {"path": "x", "size": 256},
            "autoencoder": {"id": "stabilityai/sd-vae-ft-ema"},
            "model": {"patch_size": 2, "hidden_size": 3072, "depth": 32, "num_heads": 24},
            "train": {**train, "gradient_checkpointing": True, **settings},
        }
    )
    networks, cluster = resolve_networks(recipe, num_classes=1000), parse_cluster("8xA10G")
    assert sum(worker_memory(recipe.train, networks, cluster).values()) > cluster.worker_bytes(recipe.train)
    assert suggest_smaller("train", recipe.train, networks, cluster).startswith(advice)


def test_micro_batches_divide_the_activations():
    config = named_config("DiT-S/2")
    one, four = (train_memory(config, TrainConfig(accumulation_steps=steps)) for steps in (1, 4))
    assert four["activations"] == one["activations"] / 4
    assert four | {"activations": 0} == one | {"activations": 0}


def test_an_autoencoder_on_crops_takes_the_work_of_images_of_their_size():
    def planned(size, **train):
        autoencoder = {"train": {"gpus_per_worker": 1, **train}}
        recipe = validate_recipe(
            {
                "name": "n",
                "output": "o",
                "images": {"path": "digits", "size": size},
                "autoencoder": autoencoder,
                "model": {"name": "DiT-S/2"},
                "evaluate": {"sampler": "euler"},
                "objective": {"kind": "flow"},
            }
        )
        networks = resolve_networks(recipe, num_classes=10)
        settings, cluster = recipe.autoencoder.train, parse_cluster("1xL4")
        work = autoencoder_work(settings, networks, cluster, 1000)
        return worker_memory(settings, networks, cluster), work.flops

    batch = {"global_batch_size": 64}
    (memory, flops), (expected, expected_flops) = planned(64, crop=32, **batch), planned(32, **batch)
    assert memory == pytest.approx(expected) and flops == pytest.approx(expected_flops)
    assert planned(64, **batch)[1] == pytest.approx(4 * flops)
    # Whole images are measured, one by one where they are as large as this: three maps of their size in float32.
    assert planned(512, crop=32, global_batch_size=1)[0]["activations"] == 3 * 4 * 512**2 * 32


def test_an_adapter_takes_memory_for_itself_alone():
    config, start = named_config("DiT-XL/2"), StartConfig(checkpoint="base")
    plain = train_memory(config, TrainConfig(global_batch_size=8))
    adapted = train_memory(config, TrainConfig(global_batch_size=8, start=start, lora=LoraConfig()))
    assert adapted["gradients"] == FLOAT32 * 3_096_576 == adapted["averages"] == adapted["moments"] / 2
    assert adapted["weights"] == plain["weights"] and adapted["activations"] < 0.6 * plain["activations"]
    checkpoint = checkpoint_bytes(config, TrainConfig(start=start, lora=LoraConfig()))
    assert checkpoint == 4 * FLOAT32 * 3_096_576
