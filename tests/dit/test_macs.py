import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fields import DITS, SHAPES, UVITS, WIDE_HEADS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit.config import MODEL_NAMES, config_from_dict, named_config
from dit.macs import forward_macs
from dit.model import build_model


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_macs_of_the_twelve_models_equal_the_references(name, golden):
    expected = golden("dit_param_counts.json")[name]["forward_gmac_per_image"]
    assert forward_macs(named_config(name)) / 1e9 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("conditioning", "paper"),
    [("in_context", 119.37), ("cross_attention", 137.62), ("adaln", 118.56), ("adaln_zero", 118.64)],
)
def test_macs_of_the_four_conditionings_equal_those_of_the_paper(conditioning, paper):
    macs = forward_macs(named_config("DiT-XL/2", conditioning=conditioning))
    assert macs / 1e9 == pytest.approx(paper, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(fields=st.one_of(st.fixed_dictionaries(SHAPES | kind) for kind in (DITS, WIDE_HEADS, UVITS)))
def test_macs_are_half_the_flops_that_torch_counts(fields):
    config = config_from_dict(fields)
    model = build_model(config).eval()
    x, zero = torch.zeros(1, config.in_channels, *config.latent_size), torch.zeros(1, dtype=torch.long)
    # The fused attention of the CPU is not among the operators that torch can count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, zero, zero)
    assert counter.get_total_flops() == 2 * forward_macs(config)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_refinements_hardly_change_the_macs(name):
    refined = named_config(name, qk_norm=True, norm="rms", mlp="swiglu", position="rope")
    assert forward_macs(refined) == pytest.approx(forward_macs(named_config(name)), rel=0.002)
