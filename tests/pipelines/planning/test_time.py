"""The model of a training step: its arithmetic against torch's count, and its parts against their closed forms."""

from dataclasses import replace

import pytest
import torch
from model_fields import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit.config import config_from_dict, named_config
from dit.hardware.accelerators import ACCELERATORS
from dit.hardware.measured_speeds import SAMPLING_STEP_SECONDS, TRAINING
from dit.macs import forward_macs
from dit.model import build_model
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.training import TrainConfig
from pipelines.planning.hardware import Cluster, parse_cluster
from pipelines.planning.networks import FLOAT32, count_parameters
from pipelines.planning.rates import update_seconds
from pipelines.planning.time import MIN_BLOCK_SECONDS, step_seconds

H100 = ACCELERATORS["H100"]
H200 = ACCELERATORS["H200"]


def step_on(cluster: Cluster, model, **settings):
    """Return the seconds of a training step on all accelerators of a cluster."""
    common = {"num_workers": cluster.count, "gpus_per_worker": 1, "dtype": "bfloat16", "compile": True}
    return step_seconds(model, TrainConfig(**common, **settings), cluster)


@pytest.mark.parametrize("fields", [{}, {"conditioning": "cross_attention"}, {"architecture": "uvit"}])
def test_a_training_step_is_three_forward_passes(fields):
    config = config_from_dict(SMALL | fields)
    network = build_model(config)
    x, zero = torch.zeros(2, config.in_channels, *config.latent_size), torch.zeros(2, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, zero, zero).sum().backward()
    # No gradient of the first layers' inputs is computed, of which there is a third for patches and timesteps.
    assert 0.98 * 12 * forward_macs(config) < counter.get_total_flops() <= 12 * forward_macs(config)


def test_the_largest_step_of_the_paper_is_counted_in_real_flops():
    assert 6 * forward_macs(named_config("DiT-XL/2")) == pytest.approx(0.712e12, rel=0.001)


def test_a_step_on_one_device_is_arithmetic_and_update():
    config = named_config("DiT-S/2")
    step = step_on(parse_cluster("1xH100"), config)
    trained = count_parameters(config).trained
    measured = 256 / TRAINING["DiT-S/2"].images_per_second - update_seconds(trained, H200)  # an H200 has the same peak
    assert step.forward + step.backward == pytest.approx(measured)
    # AdamW moves 7 numbers per parameter, the norm 2, an average 3
    assert step.update == FLOAT32 * (9 + 3) * trained / H100.memory_bandwidth
    assert step.all_reduce == 0


@pytest.mark.parametrize("name", TRAINING)
def test_a_step_on_the_measured_gpu_takes_as_long_as_was_measured(name):
    batch, images_per_second = TRAINING[name]
    step = step_on(parse_cluster("1xH200"), named_config(name), global_batch_size=batch)
    assert batch / (step.forward + step.backward + step.update) == pytest.approx(images_per_second)


def test_measured_sampling_takes_the_published_hours():
    config = named_config("DiT-XL/2")
    hours = {}
    for precision in SAMPLING_STEP_SECONDS:
        dtype, _, compiled = precision.partition(" ")
        settings = EvaluateConfig(num_workers=1, gpus_per_worker=1)
        speed, basis = parse_cluster("1xH200").speed("evaluate", settings, dtype, bool(compiled), config.hidden_size)
        assert basis.startswith("measured on an H200 with DiT-XL/2: ")
        hours[precision] = 50_000 * 250 * 2 * 2 * forward_macs(config) / speed / 3600
    expected = {"float32": 37.6, "tf32": 9.4, "bfloat16": 5.5, "bfloat16 compiled": 4.0}
    assert hours == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("cluster", "kind", "dtype", "compiled", "width", "basis"),
    [
        ("1xH200", "train", "bfloat16", True, 1024, "measured on an H200 with DiT-B/2: 37% of 989 TFLOP/s (bfloat16)"),
        ("1xH200", "train", "bfloat16", True, 128, "assumed: 30% of 989 TFLOP/s (bfloat16)"),
        ("1xH200", "train", "tf32", True, 1152, "assumed: 30% of 494 TFLOP/s (tf32)"),
        ("1xH200", "evaluate", "tf32", False, 768, "assumed: 30% of 494 TFLOP/s (tf32)"),
        (
            "1xH100",
            "evaluate",
            "tf32",
            False,
            1152,
            "assumed, as measured on an H200 with DiT-XL/2: 35% of 494 TFLOP/s",
        ),
        ("1xA100", "evaluate", "tf32", False, 1152, "assumed: 30% of 156 TFLOP/s (tf32)"),
        ("1xV100", "train", "tf32", False, 1152, "assumed: 60% of 16 TFLOP/s (float32)"),  # it has no TF32
        ("1xV100", "train", "bfloat16", False, 1152, "assumed: 60% of 16 TFLOP/s (float32)"),  # nor bfloat16
        ("1xT4", "evaluate", "bfloat16", True, 1152, "assumed: 60% of 8 TFLOP/s (float32)"),
        ("1xT4", "encode", "bfloat16", False, 0, "assumed: 30% of 8 TFLOP/s (float32)"),
    ],
)
def test_a_plan_says_what_was_measured_and_what_is_assumed(cluster, kind, dtype, compiled, width, basis):
    settings = TrainConfig(gpus_per_worker=1)
    assert parse_cluster(cluster).speed(kind, settings, dtype, compiled, width)[1].startswith(basis)


def test_more_workers_take_less_arithmetic_and_as_long_an_all_reduce():
    eight, many, fsdp = (
        step_on(parse_cluster(cluster), named_config("DiT-XL/2"), strategy=strategy)
        for cluster, strategy in (("8xH100", "ddp"), ("64xH100", "ddp"), ("8xH100", "fsdp"))
    )
    assert many.forward == max(eight.forward / 8, 28 * MIN_BLOCK_SECONDS)
    assert eight.all_reduce < many.all_reduce < 8 / 7 * eight.all_reduce
    assert fsdp.all_reduce == pytest.approx(1.5 * eight.all_reduce)
    assert fsdp.update == eight.update / 8


def test_fsdp_gathers_weights_in_every_micro_batch_and_scatters_gradients_in_the_last():
    """Counted in torch 2.15 with 6 blocks: 13 gathers a micro-batch, as the root stays gathered, and 7 scatters."""
    config = named_config("DiT-XL/2")

    def moved(strategy, micro_batches):
        settings = {"strategy": strategy, "accumulation_steps": micro_batches}
        return step_on(parse_cluster("8xH100"), config, **settings).all_reduce

    all_reduce = moved("ddp", 1)
    assert moved("ddp", 4) == all_reduce
    assert [moved("fsdp", count) / all_reduce for count in (1, 2, 4)] == pytest.approx([1.5, 2.5, 4.5])


def test_every_micro_batch_launches_all_blocks():
    config = named_config("DiT-S/2")
    one, four = (step_on(parse_cluster("64xH100"), config, accumulation_steps=count) for count in (1, 4))
    assert four.forward == 4 * config.depth * MIN_BLOCK_SECONDS > one.forward


def test_a_step_of_few_images_takes_as_long_as_its_launches():
    config = named_config("DiT-S/2")
    few, fewer = (step_on(parse_cluster(cluster), config) for cluster in ("128xH100", "256xH100"))
    assert few.forward == fewer.forward == config.depth * MIN_BLOCK_SECONDS


def test_an_all_reduce_between_nodes_uses_their_network_where_that_is_slower():
    config, l4 = named_config("DiT-S/2"), ACCELERATORS["L4"]._replace(network=0.1e9)
    moved = 2 * 15 / 16 * FLOAT32 * count_parameters(config).trained
    step = step_on(replace(parse_cluster("16xL4"), accelerator=l4), config)
    assert step.all_reduce == pytest.approx(moved / 0.8e9)


def test_gradient_checkpointing_costs_a_third_more():
    plain, recomputing = (
        step_on(parse_cluster("1xH100"), named_config("DiT-XL/2", gradient_checkpointing=on)) for on in (False, True)
    )
    assert recomputing.forward + recomputing.backward == pytest.approx(4 / 3 * (plain.forward + plain.backward))
