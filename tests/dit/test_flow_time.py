"""A DiT whose weights count time from data to noise, as REPA's do, is called as any other."""

import itertools
from dataclasses import replace

import pytest
import torch

from dit.config import DiTConfig, config_from_dict, recorded_fields
from dit.flow import FlowMatching
from dit.model import DiT
from dit.samplers import sample_euler
from raydit.errors import InvalidInput

CONFIG = DiTConfig(
    input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, in_channels=4, num_classes=3, learn_sigma=False
)


@pytest.fixture(scope="module")
def networks():
    """Two networks of the same weights: the first counts time as SiT, the second as REPA."""
    torch.manual_seed(0)
    network = DiT(CONFIG)
    for name, weight in network.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(weight, std=0.2)
    other = DiT(replace(CONFIG, flow_time="noise"))
    other.load_state_dict(network.state_dict())
    return network, other


def test_it_returns_the_velocity_towards_the_data(networks):
    network, other = networks
    x, y, t = torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(other(x, t, y), -network(x, 1 - t, y))


def test_its_samples_are_those_of_a_loop_from_noise_to_data_in_its_own_times(networks):
    """REPA's sampler without noise: x <- x + (t_next - t) v(x, t) with t from 1 to 0."""
    network, other = networks
    noise, labels, steps = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 2]), 5
    x, times = noise.double(), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        for now, following in itertools.pairwise(times):
            velocity = network(x.float(), torch.full((3,), float(now)), labels)
            x = x + (following - now) * velocity.double()
        ours = sample_euler(other, noise, labels, process=FlowMatching(), steps=steps)
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=1e-5)


def test_it_is_recorded_where_it_is_set_alone():
    assert "flow_time" not in recorded_fields(CONFIG)
    config = replace(CONFIG, flow_time="noise")
    assert config_from_dict(recorded_fields(config)) == config
    with pytest.raises(InvalidInput, match="flow_time"):
        replace(CONFIG, flow_time="data")
