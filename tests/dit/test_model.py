import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fields import DITS, UVITS, WIDE_HEADS

from dit.config import MODEL_NAMES, DiTConfig, config_from_dict
from dit.layers.embeddings import position_embedding, timestep_embedding, unpatchify
from dit.model import DiT, build_model, build_uninitialized, create_model

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
REFINED = {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "position": "rope"}
VARIANTS = {
    **{name: {"conditioning": name} for name in CONDITIONINGS},
    **{
        f"refined_{name}": {"conditioning": name, **REFINED} for name in ("adaln_zero", "cross_attention", "in_context")
    },
    "uvit": {"architecture": "uvit"},
    "uvit_other": {"architecture": "uvit", "mlp_time_embed": True, "qkv_bias": True, "final_conv": False},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def inputs(config, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.in_channels, *config.latent_size, generator=generator)
    t = torch.randint(0, 1000, (count,), generator=generator)
    y = torch.randint(0, max(config.num_classes, 1), (count,), generator=generator)
    return x, t, y


def test_forward_equals_the_reference(dit_a, golden):
    io = golden("dit_a.io.safetensors")
    seen = {}
    parts = ["x_embedder", "t_embedder", "y_embedder", "final_layer", "blocks.0", "blocks.1"]
    hooks = [
        dit_a.get_submodule(part).register_forward_hook(lambda _, __, out, part=part: seen.update({part: out}))
        for part in parts
    ]
    with torch.no_grad():
        out = dit_a(io["x"], io["t"], io["y"])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(out, io["out"], atol=1e-5, rtol=0)
    for part in parts:
        expected = io[part.replace("blocks.", "block") + "_out"]
        torch.testing.assert_close(seen[part], expected, atol=1e-5, rtol=0)


def test_embeddings_equal_the_reference(golden):
    expected = golden("embeddings.safetensors")
    torch.testing.assert_close(position_embedding(64, 4, 4), expected["pos_grid4_dim64"], atol=1e-12, rtol=0)
    # Of exp a machine's library may miss the last bit of a frequency, which an angle is t times: 3e-5 of t = 999.
    frequencies = 10000.0 ** (-torch.arange(128) / 128)
    rounding = expected["t"][:, None] * frequencies.repeat(2) * torch.finfo(torch.float32).eps
    error = (timestep_embedding(expected["t"], 256) - expected["t_emb_256"]).abs()
    assert (error <= 1e-6 + rounding).all(), error.max()


def test_position_embedding_of_a_rectangle_encodes_column_then_row():
    table = position_embedding(16, 3, 5).view(3, 5, 16)
    torch.testing.assert_close(table[0, :, :8], table[2, :, :8])
    torch.testing.assert_close(table[:, 0, 8:], table[:, 4, 8:])
    torch.testing.assert_close(table[:, :, 0], torch.arange(5.0, dtype=torch.float64).sin().expand(3, 5))


def test_keys_and_shapes_are_the_official_ones(golden):
    with torch.device("meta"):
        model = create_model("DiT-XL/2")
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == golden("dit_xl2_keys.json")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameter_counts_are_the_official_ones(name, golden):
    expected = golden("dit_param_counts.json")[name]
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == expected["total_with_pos_embed"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["trainable"]
    assert len(model.state_dict()) == expected["n_state_dict_keys"]


@pytest.mark.parametrize(
    ("conditioning", "paper"),
    [("in_context", 449), ("cross_attention", 598), ("adaln", 600), ("adaln_zero", 675)],
)
def test_parameter_counts_of_the_four_conditionings_equal_those_of_the_paper(conditioning, paper):
    with torch.device("meta"):
        model = create_model("DiT-XL/2", conditioning=conditioning)
    assert sum(p.numel() for p in model.parameters()) // 10**6 == paper


@pytest.mark.parametrize("options", [{}, REFINED], ids=["plain", "refined"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_fresh_model_outputs_zero(conditioning, options):
    shape = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    config = DiTConfig(**shape, conditioning=conditioning, **options)
    assert torch.equal(DiT(config)(*inputs(config)), torch.zeros(2, 8, 8, 8))


@pytest.mark.parametrize("options", [{}, REFINED], ids=["plain", "refined"])
def test_fresh_adaln_zero_blocks_are_the_identity(options):
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, **options))
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, c, model.rotation), tokens)


def test_initialisation_follows_the_paper():
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=8, hidden_size=128, depth=1, num_heads=4))
    state = model.state_dict()
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "x_embedder.proj.weight"):
        rows, columns = state[name].flatten(1).shape
        bound = (6 / (rows + columns)) ** 0.5
        assert bound * 0.98 < state[name].abs().max() <= bound
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.05)
    zeros = [n for n in state if "adaLN_modulation" in n or "final_layer.linear" in n or n.endswith("bias")]
    assert all(not state[name].any() for name in zeros)


def test_label_table_has_a_null_row_only_with_dropout():
    rows = {
        dropout: DiT(
            DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, class_dropout_prob=dropout)
        ).y_embedder.embedding_table.weight.shape[0]
        for dropout in (0.0, 0.1)
    }
    assert rows == {0.0: 1000, 0.1: 1001}


@every_variant
def test_timestep_label_and_latents_all_reach_the_output(fields, small_model):
    model = small_model(**fields)
    x, t, y = inputs(model.config)
    out = model(x, t, y)
    for other in ((x + 1, t, y), (x, (t + 100) % 1000, y), (x, t, torch.full_like(y, model.null_class))):
        assert (model(*other) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-3


shapes = {
    "patch_size": st.sampled_from([1, 2, 4]),
    "in_channels": st.integers(1, 4),
    "hidden_size": st.just(16),
    "num_heads": st.sampled_from([1, 2, 4]),
    "num_classes": st.integers(0, 3),
    "class_dropout_prob": st.sampled_from([0.0, 0.1]),
}
dits = {"architecture": st.just("dit"), "depth": st.integers(1, 2), **DITS}
uvits = {"depth": st.sampled_from([2, 4]), **UVITS}


@settings(max_examples=40, deadline=None)
@given(
    fields=st.fixed_dictionaries(shapes | dits) | st.fixed_dictionaries(shapes | uvits),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    count=st.integers(1, 3),
)
def test_output_has_the_latents_shape_for_every_configuration(fields, rows, columns, count):
    patch, channels = fields["patch_size"], fields["in_channels"]
    config = config_from_dict({**fields, "input_size": (rows * patch, columns * patch)})
    out = build_model(config)(*inputs(config, count))
    out_channels = channels * (2 if fields.get("learn_sigma") else 1)
    assert out.shape == (count, out_channels, rows * patch, columns * patch)
    assert out.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_inverts_patchify(count, channels, patch, rows, columns):
    images = torch.randn(count, channels, rows * patch, columns * patch)
    patches = torch.nn.functional.unfold(images, patch, stride=patch)  # (N, C * p * p, T), channel slowest
    tokens = patches.view(count, channels, patch * patch, -1).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(unpatchify(tokens, patch, (rows, columns)), images)


@every_variant
def test_an_image_is_the_same_alone_and_in_a_batch_of_64(fields, small_model):
    model = small_model(**fields)
    x, t, y = inputs(model.config, count=64)
    torch.testing.assert_close(model(x, t, y)[40:41], model(x[40:41], t[40:41], y[40:41]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adaln_zero", "refined_in_context", "uvit"])
def test_gradient_checkpointing_changes_no_gradient(name, small_model):
    model = small_model(**VARIANTS[name])
    again = small_model(**VARIANTS[name], gradient_checkpointing=True)
    for each in (model, again):
        each(*inputs(model.config)).square().mean().backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.grad is not None or not one.requires_grad
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    "name",
    ["adaln_zero", "refined_in_context", "uvit"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in CONDITIONINGS if name != "adaln_zero"],
)
def test_compiles_into_one_graph(name, small_model):
    model = small_model(**VARIANTS[name])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(model.config)), model(*inputs(model.config)))


@every_variant
def test_runs_in_bfloat16(fields, small_model):
    model = small_model(**fields)
    x, t, y = inputs(model.config)
    expected = model(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(x, t, y)
    in_bfloat16 = small_model(**fields).bfloat16()(x.bfloat16(), t, y)
    for out in (under_autocast, in_bfloat16):
        assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("architecture", ["dit", "uvit"])
def test_unconditional_model_takes_no_labels(architecture, small_model):
    model = small_model(architecture=architecture, num_classes=0)
    x, t, _ = inputs(model.config)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 7])))
    assert model.null_class is None


@pytest.mark.parametrize("architecture", ["dit", "uvit"])
@pytest.mark.parametrize(
    ("change", "found", "expected", "advice"),
    [
        ({"x": torch.zeros(2, 4, 16, 16)}, "(2, 4, 16, 16)", "expected (N, 4, 8, 8)", "input_size"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "(2, 3, 8, 8)", "expected (N, 4, 8, 8)", "in_channels"),
        ({"t": torch.tensor(3)}, "shape ()", "expected (2,)", "one timestep per image"),
        ({"y": None}, "missing", "expected (2,)", "null_class"),
        ({"y": torch.zeros(3, dtype=torch.long)}, "(3,)", "expected (2,)", "one class per image"),
        ({"y": torch.tensor([0, 11])}, "0 to 11", "expected 0 to 10", "Check num_classes"),
        ({"y": torch.tensor([-1, 1])}, "-1 to 1", "expected 0 to 10", "Check num_classes"),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(
    change, found, expected, advice, architecture, small_model
):
    model = small_model(architecture=architecture)
    x, t, y = inputs(model.config)
    with pytest.raises(ValueError) as error:
        model(**{"x": x, "t": t, "y": y, **change})
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)


@every_variant
def test_a_model_rebuilt_from_its_recorded_config_loads_its_weights(fields, small_model):
    model = small_model(**fields)
    again = build_model(config_from_dict(json.loads(json.dumps(dataclasses.asdict(model.config)))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*inputs(model.config)), model(*inputs(model.config)))


@given(fields=st.one_of(st.fixed_dictionaries(WIDE_HEADS), st.fixed_dictionaries(UVITS)))
@settings(max_examples=20, deadline=None)
def test_a_model_that_weights_are_loaded_into_draws_none_and_is_then_the_same(fields):
    config = config_from_dict(fields | {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4})
    expected = build_model(config)
    random = torch.get_rng_state()
    found = build_uninitialized(config)
    assert torch.equal(torch.get_rng_state(), random)
    found.load_state_dict(expected.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        tensors = dict(getattr(found, kind)())
        for name, tensor in getattr(expected, kind)():
            assert torch.equal(tensors.pop(name), tensor)
        assert not tensors
