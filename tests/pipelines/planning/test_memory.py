"""The memory of a training worker against the tensors that torch allocates."""

import torch
from model_fields import SMALL

from dit.config import config_from_dict, named_config
from dit.model import build_model
from dit.train import create_state, train_step
from pipelines.config.training import TrainConfig
from pipelines.planning.memory import activation_bytes, train_memory
from pipelines.planning.networks import FLOAT32, count_parameters


def test_a_training_state_takes_the_bytes_of_its_tensors():
    config = config_from_dict(SMALL)
    settings = TrainConfig(steps=1, global_batch_size=4, ema_sigma_rels=(0.05,))
    state = create_state(build_model(config), settings)
    x, zero = torch.randn(2, config.in_channels, *config.latent_size), torch.zeros(2, dtype=torch.long)
    train_step(state, x, lambda network, x: {"loss": network(x, zero, zero).square().mean()}, settings)
    parameters = list(state.network.parameters())
    moments = [m for tensors in state.optimizer.state.values() for m in tensors.values() if m.ndim]
    averages = [tensor for average in state.averages.values() for tensor in average.state_dict().values()]
    assert train_memory(config, settings) == {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.nbytes for p in parameters if p.requires_grad),
        "moments": sum(m.nbytes for m in moments),
        "averages": sum(tensor.nbytes for tensor in averages),
        "gathered": 0,
        "activations": 4 * activation_bytes(config),
    }


def test_fsdp_divides_the_state_and_gathers_blocks():
    config, parts = named_config("DiT-XL/2"), ("weights", "gradients", "moments", "averages")
    ddp = train_memory(config, TrainConfig(global_batch_size=8, num_workers=8))
    fsdp = train_memory(config, TrainConfig(global_batch_size=8, num_workers=8, strategy="fsdp"))
    assert all(fsdp[part] == ddp[part] / 8 for part in parts)
    assert 3 * FLOAT32 * count_parameters(config).block < fsdp["gathered"] < 0.2 * ddp["weights"]
    assert fsdp["activations"] == ddp["activations"]


def test_micro_batches_divide_the_activations():
    config = named_config("DiT-S/2")
    one, four = (train_memory(config, TrainConfig(accumulation_steps=steps)) for steps in (1, 4))
    assert four["activations"] == one["activations"] / 4
    assert four | {"activations": 0} == one | {"activations": 0}
