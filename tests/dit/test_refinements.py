"""Refinements that the paper does not have: QK-norm, RMS norm, SwiGLU, rotary positions."""

import cmath

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import MODEL_NAMES, DiTConfig, named_config
from dit.layers.attention import Attention, CrossAttention, RMSNorm, rotate, rotation_table
from dit.layers.blocks import SwiGLU
from dit.model import create_model


def count(name, **options):
    with torch.device("meta"):
        model = create_model(name, **options)
    return sum(p.numel() for p in model.parameters())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), quarter=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_rotated_logits_depend_on_relative_positions_only(rows, columns, quarter, seed):
    """As complex pairs, logit(i, j) = Re sum_k q_k conj(k_k) exp(1j w_k (p_i - p_j)), p the column or the row."""
    q, k = torch.randn(2, 4 * quarter, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = rotation_table(4 * quarter, rows, columns)
    logits = rotate(q.expand(rows * columns, -1), table) @ rotate(k.expand(rows * columns, -1), table).T
    pairs = torch.complex(*q.chunk(2)) * torch.complex(*k.chunk(2)).conj()
    for i, j in [(0, rows * columns - 1), (rows * columns // 2, 0), (0, 0)]:
        columns_apart, rows_apart = i % columns - j % columns, i // columns - j // columns
        expected = sum(
            pairs[axis * quarter + n].item() * cmath.exp(1j * apart * 10000 ** (-n / quarter))
            for axis, apart in enumerate((columns_apart, rows_apart))
            for n in range(quarter)
        )
        assert logits[i, j].item() == pytest.approx(expected.real, abs=1e-9)


def test_conditioning_tokens_are_not_rotated():
    table = rotation_table(8, 3, 2, num_unrotated=2)
    x = torch.randn(1, 4, 2 + 6, 8, dtype=torch.float64)
    turned = rotate(x, table)
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    assert torch.equal(turned[:, :, 2:], rotate(x[:, :, 2:], rotation_table(8, 3, 2)))
    assert (turned[:, :, 3:] != x[:, :, 3:]).any(dim=-1).all()


def test_in_context_model_rotates_image_tokens_only(small_model):
    model = small_model(conditioning="in_context", position="rope")
    assert torch.equal(model.rotation, rotation_table(8, 4, 4, num_unrotated=2).float())
    assert small_model(position="rope").rotation.shape == (2, 16, 4)
    assert small_model(conditioning="in_context", position="rope", num_classes=0).rotation.shape == (2, 17, 4)


def test_rope_models_see_positions_without_a_position_table(small_model):
    """Rolling the latents by a patch must do more than roll the output, as it would without positions."""
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])
    moved = x.roll(2, dims=3)
    model = small_model(position="rope")
    assert model.pos_embed is None
    assert (model(moved, t, y) - model(x, t, y).roll(2, dims=3)).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_the_residual_stream_is_float32_under_autocast(position, small_model):
    model, seen = small_model(position=position), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3]))
    assert seen == [torch.float32] * 4


def test_rms_norm_equals_torchs_and_keeps_the_dtype():
    x = torch.randn(2, 3, 16)
    norm, torchs = RMSNorm(16), torch.nn.RMSNorm(16, eps=1e-6)
    with torch.no_grad():
        for each in (norm, torchs):
            each.weight.copy_(torch.linspace(0.5, 2, 16))
    torch.testing.assert_close(norm(x), torchs(x))
    torch.testing.assert_close(RMSNorm(16, affine=False)(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), torchs(x), atol=0.02, rtol=0.02)


def test_attention_with_qk_norm_ignores_the_scale_of_queries_and_keys():
    x, c = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    attention, cross = Attention(16, 4, qk_norm=True), CrossAttention(16, 4, qk_norm=True)
    before = attention(x), cross(x, c)
    with torch.no_grad():
        for layer, rows in ((attention.qkv, slice(0, 32)), (cross.q, slice(None)), (cross.kv, slice(0, 16))):
            layer.weight[rows] *= 50
            layer.bias[rows] *= 50
    torch.testing.assert_close((attention(x), cross(x, c)), before, atol=1e-4, rtol=1e-3)


def test_attention_with_qk_norm_and_rope_equals_the_formula():
    attention, x = Attention(8, 2, qk_norm=True).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    table = rotation_table(4, 2, 3)
    with torch.no_grad():
        attention.q_norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    heads = []
    for head in range(2):
        q, k, v = (
            F.linear(x, *(p[start + 4 * head : start + 4 * head + 4] for p in attention.qkv.parameters()))
            for start in (0, 8, 16)
        )
        q, k = (a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
        q, k = rotate(q * attention.q_norm.weight, table), rotate(k, table)
        logits = q @ k.transpose(1, 2) / 2
        heads.append(logits.softmax(-1) @ v)
    torch.testing.assert_close(attention(x, table), attention.proj(torch.cat(heads, -1)), atol=1e-6, rtol=1e-6)


def test_swiglu_multiplies_values_by_silu_of_gates():
    layer, x = SwiGLU(4, 8), torch.randn(2, 3, 4)
    hidden = x @ layer.fc1.weight.T + layer.fc1.bias
    gate, value = hidden[..., :8], hidden[..., 8:]
    expected = (gate * gate.sigmoid() * value) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_swiglu_hardly_changes_the_number_of_parameters(name):
    assert count(name, mlp="swiglu") == pytest.approx(count(name), rel=0.002)
    assert named_config(name, mlp="swiglu").mlp_size % 8 == 0


def test_refinements_change_the_parameters_by_their_formulas():
    config = named_config("DiT-XL/2")
    plain, cross = count("DiT-XL/2"), count("DiT-XL/2", conditioning="cross_attention")
    depth, width, head = config.depth, config.hidden_size, config.head_size
    assert count("DiT-XL/2", qk_norm=True) - plain == depth * 2 * head
    assert count("DiT-XL/2", conditioning="cross_attention", qk_norm=True) - cross == depth * 4 * head
    assert count("DiT-XL/2", norm="rms") == plain
    # Norms of blocks without modulation lose their shifts: three in each block, and the last.
    assert cross - count("DiT-XL/2", conditioning="cross_attention", norm="rms") == (3 * depth + 1) * width
    assert plain - count("DiT-XL/2", position="rope") == config.num_tokens * width


@pytest.mark.parametrize(
    ("fields", "found", "expected", "advice"),
    [
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm'", "one of layer, rms", "did you mean 'rms'?"),
        ({"mlp": "geglu"}, "mlp is 'geglu'", "one of gelu, swiglu", "did you mean"),
        ({"position": "rotary"}, "position is 'rotary'", "one of sincos, rope", "did you mean 'rope'?"),
        (
            {"position": "rope", "num_heads": 192},
            "heads of width 6",
            "a head width that is a multiple of 4",
            "Change num_heads",
        ),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(fields, found, expected, advice):
    with pytest.raises(ValueError) as error:
        DiTConfig(**fields)
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)
