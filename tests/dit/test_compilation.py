"""Compilation block by block: how often a block is compiled, and that results stay those of the uncompiled network."""

import copy

import pytest
import torch
import torch.distributed as distributed
from compile_counter import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from dit.compilation import MAX_COMPILED_VARIANTS
from dit.conditions import Conditions
from dit.flow import FlowMatching
from dit.samplers import guided, sample_euler

CONDITIONINGS = ["adaln_zero", "adaln", "cross_attention", "in_context"]


@pytest.fixture
def counter():
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


def inputs(size=4):
    return torch.randn(size, 4, 8, 8), torch.rand(size), torch.arange(size) % 10


def train_pass(network, batch):
    """Return the output of a forward pass, and the gradients of its mean square by their names."""
    output = network(*batch)
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_trains_alike(network, counter):
    compiled, batch = counter.compile(copy.deepcopy(network)), inputs()
    torch.testing.assert_close(train_pass(compiled, batch), train_pass(network, batch), rtol=1e-4, atol=1e-5)
    assert list(compiled.state_dict()) == list(network.state_dict())


def test_one_compiled_block_serves_networks_of_all_depths(small_model, counter):
    for depth, checkpointing in ((2, False), (6, False), (12, True)):
        assert_trains_alike(small_model(depth=depth, gradient_checkpointing=checkpointing), counter)
        assert (counter.forward, counter.backward) == (1, 1)
    network = counter.compile(small_model(depth=6))
    for _ in range(2):  # one more for validation, and training goes on with its own
        with torch.no_grad():
            network.eval()(*inputs(6))
        train_pass(network.train(), inputs(4))
        assert (counter.forward, counter.backward) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [({"depth": 3}, 1), pytest.param({"architecture": "uvit", "depth": 4}, 2, marks=pytest.mark.slow)],
)
def test_sampling_compiles_each_kind_of_block_with_guidance_and_without(small_model, counter, fields, kinds):
    plain = small_model(**fields)
    compiled, (noise, _, labels) = counter.compile(copy.deepcopy(plain)), inputs()

    def sample(network):
        model = guided(network, 2.0, interval=(0.0, 0.5))
        return sample_euler(model, noise, Conditions(labels), process=FlowMatching(), steps=4)

    torch.testing.assert_close(sample(compiled), sample(plain), rtol=1e-4, atol=1e-4)
    assert (counter.forward, counter.backward) == (2 * kinds, 0)


@pytest.mark.slow  # traces a dozen graphs
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("refinements", [{}, {"position": "rope", "qk_norm": True, "mlp": "swiglu", "norm": "rms"}])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_kind_of_block_is_one_graph(small_model, counter, conditioning, refinements, checkpointing):
    fields = {"conditioning": conditioning, "gradient_checkpointing": checkpointing, **refinements}
    assert_trains_alike(small_model(depth=3, **fields), counter)
    assert (counter.forward, counter.backward) == (1, 1)


@pytest.mark.slow
def test_a_u_vit_has_two_kinds_of_blocks(small_model, counter):
    for depth, checkpointing in ((2, False), (6, True)):
        assert_trains_alike(
            small_model(architecture="uvit", depth=depth, gradient_checkpointing=checkpointing), counter
        )
        assert (counter.forward, counter.backward) == (2, 2)


@pytest.mark.slow
def test_models_of_many_sizes_in_one_process_are_all_compiled(small_model, counter):
    """As in an evaluation of many checkpoints; torch's own limit would leave the ninth uncompiled."""
    widths = range(32, 32 + 4 * 12, 4)
    assert 8 < len(widths) < MAX_COMPILED_VARIANTS
    for width in widths:
        with torch.no_grad():
            counter.compile(small_model(hidden_size=width))(*inputs())
    assert counter.forward == len(widths)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_does_not_cut_a_block_into_graphs(small_model, counter, process_group):
    network = counter.compile(small_model(hidden_size=384, depth=2))
    several_buckets_a_block = DistributedDataParallel(network, bucket_cap_mb=1)
    train_pass(several_buckets_a_block, inputs())
    assert (counter.forward, counter.backward) == (1, 1)
