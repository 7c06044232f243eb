"""Products of a training of an adapter, or of a part of the parameters, against torch's count."""

import pytest
from model_fields import SMALL
from tiny_partial_training import CASES, TRAININGS, inputs, partial_network, partial_settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit.config import config_from_dict, named_config
from dit.macs import forward_macs
from pipelines.config.training import TrainConfig
from pipelines.planning.backward import training_macs
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.networks import FLOAT32, count_parameters
from pipelines.planning.time import step_seconds


def torch_flops(config, settings):
    """Return the FLOPs of a forward and a backward pass on one image."""
    network = partial_network(config, settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs(config, 2)).square().sum().backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("fields", "training"), CASES, ids=str)
def test_the_products_of_a_partial_training_are_those_of_torch(fields, training):
    config, settings = config_from_dict(SMALL | fields), partial_settings(**training)
    macs = training_macs(config, settings)
    assert 2 * (macs.forward + macs.backward) == pytest.approx(torch_flops(config, settings), rel=0.02)


def test_a_full_training_is_planned_as_in_mfu():
    config = named_config("DiT-XL/2", gradient_checkpointing=True)
    forward = forward_macs(config)
    assert training_macs(config, TrainConfig()) == (forward, 2 * forward, forward)


def test_nothing_is_computed_again_before_the_first_layer_that_is_trained():
    config = config_from_dict(SMALL | {"gradient_checkpointing": True})
    upper = training_macs(config, partial_settings(**TRAININGS["upper mlp"]))
    assert upper.recomputed == pytest.approx(forward_macs(config) / 2, rel=0.05)
    assert training_macs(config, partial_settings(**TRAININGS["final layer"])).recomputed == 0


@pytest.mark.parametrize(
    ("training", "trained"),
    [({"targets": ("attention",), "rank": 16}, 3_096_576), ({"freeze": TRAININGS["final layer"]["freeze"]}, 2_693_408)],
    ids=str,
)
def test_only_what_is_trained_is_reduced_and_updated(training, trained):
    config, cluster = named_config("DiT-XL/2"), parse_cluster("64xH100")
    common = {"num_workers": 64, "gpus_per_worker": 1, "dtype": "bfloat16", "ema_sigma_rels": (0.05,)}
    full = step_seconds(config, TrainConfig(**common), cluster)
    part = step_seconds(config, partial_settings(**training, **common), cluster)
    share = trained / count_parameters(config).trained
    assert part.all_reduce == pytest.approx(share * full.all_reduce)
    assert part.update == pytest.approx(share * full.update)
    assert part.update == pytest.approx(FLOAT32 * (9 + 2 * 3) * trained / cluster.accelerator.memory_bandwidth)


def test_fsdp_gathers_what_is_frozen_as_well():
    config, cluster = named_config("DiT-XL/2"), parse_cluster("8xH100")
    common = {"num_workers": 8, "gpus_per_worker": 1, "strategy": "fsdp"}
    full = step_seconds(config, TrainConfig(**common), cluster)
    adapter = step_seconds(config, partial_settings(targets=("attention",), **common), cluster)
    assert 2 / 3 < adapter.all_reduce / full.all_reduce < 0.7
