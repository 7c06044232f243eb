"""Weights that are fitted to another model compute what they say: to the bit, or by a closed form."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit.adaptation.comparison import require_adaptable, with_inherited_fields
from dit.adaptation.depth import source_blocks
from dit.adaptation.draft_weights import TrainedModel
from dit.adaptation.patches import resample_embedding, resample_output, resize_matrix
from dit.adaptation.positions import interpolate_positions
from dit.config import DiTConfig, UViTConfig
from dit.layers.embeddings import position_embedding, unpatchify
from dit.model import build_model
from dit.start_weights import StartWeights, fates_by_kind, start_weights, summarize_fates
from raydit.errors import InvalidInput

FLOW = {"kind": "flow"}
CLASSES = ("a", "b", "c")
SMALL = DiTConfig(
    input_size=8, patch_size=2, hidden_size=16, depth=3, num_heads=2, in_channels=4, num_classes=3, learn_sigma=False
)
UVIT = UViTConfig(input_size=8, patch_size=2, hidden_size=16, depth=4, num_heads=2, num_classes=3)


def random_model(config, seed=0):
    """A network with random weights, also where a new one has zeros."""
    torch.manual_seed(seed)
    network = build_model(config).eval()
    for name, parameter in network.named_parameters():
        if name != "pos_embed" or isinstance(config, UViTConfig):
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def start(
    base, config=None, classes=CLASSES, base_classes=CLASSES, objective=FLOW, base_objective=FLOW, reset=(), **changes
) -> StartWeights:
    """Fit the weights of a network to another configuration, by default its own with changes."""
    config = config or replace(base.config, **changes)
    return start_weights(
        base.state_dict(),
        TrainedModel(config=base.config, objective=base_objective, class_names=base_classes),
        TrainedModel(config=config, objective=objective, class_names=classes),
        reset=reset,
        fresh=lambda: random_model(config, seed=9).state_dict(),
    )


def network_of(started, config):
    network = build_model(config).eval()
    network.load_state_dict(started.weights)
    return network


def inputs(config, count=3):
    torch.manual_seed(5)
    x = torch.randn(count, config.in_channels, *config.latent_size)
    labels = torch.arange(count) % (config.num_classes + 1) if config.num_classes else None
    return x, torch.rand(count), labels


def table(started):
    return {name: set(names) for name, names in fates_by_kind(started.fates).items()}


@pytest.mark.parametrize("config", [SMALL, UVIT, replace(SMALL, position="rope", conditioning="in_context")])
def test_an_equal_model_takes_all_tensors_over_to_the_bit(config):
    base = random_model(config)
    started = start(base)
    expected = base.state_dict()
    assert table(started) == {"equal": set(expected)} and started.weights.keys() == expected.keys()
    assert all(torch.equal(started.weights[name], tensor) for name, tensor in expected.items())


def test_classes_keep_their_rows_by_name_and_new_ones_start_at_the_null_class():
    base = random_model(SMALL)
    rows = base.state_dict()["y_embedder.embedding_table.weight"]
    started = start(base, classes=("new", "c", "a", "other"), num_classes=4)
    found = started.weights["y_embedder.embedding_table.weight"]
    assert torch.equal(found, rows[[3, 2, 0, 3, 3]])
    (note,) = [fate.note for fate in started.fates if fate.fate == "adapted"]
    assert note == "2 of 4 classes by name; new, from the null class: new, other; dropped: b"
    without_null = start(base, classes=("b",), num_classes=1, class_dropout_prob=0.0)
    assert torch.equal(without_null.weights["y_embedder.embedding_table.weight"], rows[[1]])
    no_null = random_model(replace(SMALL, class_dropout_prob=0.0))
    table = no_null.state_dict()["y_embedder.embedding_table.weight"]
    gained = start(no_null, class_dropout_prob=0.1).weights["y_embedder.embedding_table.weight"]
    assert torch.equal(gained[:3], table) and torch.equal(gained[3], table.mean(0))


def test_a_model_of_reordered_classes_computes_the_same_for_every_class():
    base = random_model(SMALL)
    changed = network_of(start(base, classes=("c", "a", "b")), SMALL)
    x, t, _ = inputs(SMALL)
    assert torch.equal(changed(x, t, torch.tensor([0, 1, 2])), base(x, t, torch.tensor([2, 0, 1])))


def test_learned_sigma_is_added_as_zero_and_dropped_without_a_change_of_the_prediction():
    diffusion = {"kind": "diffusion", "variance": "learned_range"}
    fixed = {"kind": "diffusion", "variance": "fixed_small"}
    base, (x, t, y) = random_model(SMALL), inputs(SMALL)
    added = start(base, learn_sigma=True, base_objective=fixed, objective=diffusion)
    prediction, variance = network_of(added, replace(SMALL, learn_sigma=True))(x, t, y).chunk(2, dim=1)
    torch.testing.assert_close(prediction, base(x, t, y), rtol=1e-6, atol=1e-6)
    assert not variance.any()
    learned = random_model(replace(SMALL, learn_sigma=True))
    dropped = network_of(start(learned, learn_sigma=False, base_objective=diffusion, objective=fixed), SMALL)
    torch.testing.assert_close(dropped(x, t, y), learned(x, t, y)[:, :4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("input_size", [12, (8, 16)])
def test_sine_cosine_positions_are_those_of_the_new_grid(input_size):
    base = random_model(SMALL)
    config = replace(SMALL, input_size=input_size)
    started = start(base, config)
    expected = position_embedding(16, *config.grid_size).float()[None]
    assert torch.equal(started.weights["pos_embed"], expected)
    assert {fate.name for fate in started.fates if fate.fate == "adapted"} == {"pos_embed"}


def test_rotary_positions_need_nothing_at_another_resolution():
    base = random_model(replace(SMALL, position="rope"))
    assert set(table(start(base, input_size=16))) == {"equal"}


def test_learned_positions_are_interpolated_and_those_of_conditions_kept():
    base = random_model(UVIT)
    positions = base.state_dict()["pos_embed"]
    found = start(base, input_size=16).weights["pos_embed"]
    assert torch.equal(found[:, :2], positions[:, :2]) and found.shape == (1, 2 + 64, 16)
    # Bicubic interpolation reproduces linear functions away from the border.
    rows = torch.arange(12.0)
    linear = (2 * rows[:, None] + 3 * rows + 1).reshape(1, -1, 1)
    larger = interpolate_positions(linear, (12, 12), (24, 24)).reshape(24, 24)
    at = (torch.arange(24.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(larger[6:-6, 6:-6], (2 * at[:, None] + 3 * at + 1)[6:-6, 6:-6])


@pytest.mark.parametrize(("old", "new"), [(2, 4), (1, 2), (2, 3), (4, 8)])
def test_the_embedding_of_an_enlarged_patch_is_that_of_the_patch(old, new):
    """FlexiViT: <B x, w'> = <x, w> for every patch x, where B enlarges."""
    torch.manual_seed(0)
    weight, patches = torch.randn(5, 3, old, old), torch.randn(7, 3, old, old)
    enlarged = F.interpolate(patches, size=(new, new), mode="bilinear", align_corners=False)
    resampled = resample_embedding(weight, new)
    found = F.conv2d(enlarged, resampled).flatten(1)
    torch.testing.assert_close(found, F.conv2d(patches, weight).flatten(1), rtol=1e-4, atol=1e-5)


def test_the_embedding_of_a_smaller_patch_is_the_least_squares_solution():
    torch.manual_seed(0)
    weight, matrix = torch.randn(5, 3, 4, 4, dtype=torch.float64), resize_matrix(4, 2)
    expected = torch.linalg.lstsq(matrix.T, weight.flatten(0, 1).flatten(1).T).solution.T
    torch.testing.assert_close(resample_embedding(weight, 2).flatten(0, 1).flatten(1), expected)


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2)])
def test_the_final_layer_predicts_the_resized_patch(old, new):
    torch.manual_seed(0)
    weight, bias, token = torch.randn(old * old * 3, 6), torch.randn(old * old * 3), torch.randn(2, 1, 6)
    patch = unpatchify(F.linear(token, weight, bias), old, (1, 1))
    resized = F.linear(token, resample_output(weight, 3, new), resample_output(bias, 3, new))
    expected = F.interpolate(patch, size=(new, new), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(unpatchify(resized, new, (1, 1)), expected)


@pytest.mark.parametrize("base_config", [SMALL, UVIT, replace(SMALL, head_width=20, head_depth=1)])
def test_a_model_of_larger_patches_computes_on_enlarged_latents_what_the_base_computes(base_config):
    """The same tokens, the same grid: the prediction is the base's, each patch of it enlarged."""
    if isinstance(base_config, UViTConfig):
        base_config = replace(base_config, final_conv=False)
    base = random_model(base_config)
    config = replace(base_config, patch_size=4, input_size=16)
    changed, (x, t, y) = network_of(start(base, config), config), inputs(base_config)

    def enlarge(latents):
        patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # (N, C, 4, 4, 2, 2)
        enlarged = F.interpolate(patches.flatten(0, 3)[:, None], size=(4, 4), mode="bilinear", align_corners=False)
        return enlarged.reshape(3, -1, 4, 4, 4, 4).transpose(3, 4).reshape(3, -1, 16, 16)

    torch.testing.assert_close(changed(enlarge(x), t, y), enlarge(base(x, t, y)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(3, 3, [0, 1, 2]), (3, 6, [0, 0, 1, 1, 2, 2]), (4, 6, [0, 1, 1, 2, 2, 3]), (6, 3, [0, 3, 5]), (4, 1, [0])],
)
def test_blocks_are_copied_and_dropped_evenly(old, new, expected):
    assert source_blocks(old, new) == expected


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, conditioning="adaln", norm="rms"),
        replace(SMALL, conditioning="cross_attention", qk_norm=True),
        replace(SMALL, conditioning="in_context", mlp="swiglu"),
        UVIT,
    ],
)
def test_a_deeper_model_computes_at_first_what_the_base_computes_and_every_block_learns(config):
    base, (x, t, y) = random_model(config), inputs(config)
    deeper = replace(config, depth=6 if isinstance(config, DiTConfig) else 8)
    started = start(base, deeper)
    network = network_of(started, deeper)
    assert torch.equal(network(x, t, y), base(x, t, y))
    own = {tensor.data_ptr() for tensor in started.weights.values()}
    assert len(own) == len(started.weights)  # safetensors stores no tensors that share memory
    network(x, t, y).square().sum().backward()
    lists = [network.blocks] if isinstance(config, DiTConfig) else [network.in_blocks, network.out_blocks]
    for block in (block for blocks in lists for block in blocks):
        assert any(parameter.grad.abs().max() > 0 for parameter in block.parameters())
    assert "dropped" not in table(started)


def test_a_shallower_model_has_the_first_the_last_and_evenly_spaced_blocks():
    base = random_model(replace(SMALL, depth=6))
    started, weights = start(base, depth=3), base.state_dict()
    for block, source in enumerate([0, 3, 5]):
        name = "attn.qkv.weight"
        assert torch.equal(started.weights[f"blocks.{block}.{name}"], weights[f"blocks.{source}.{name}"])
    dropped = table(started)["dropped"]
    assert {name.split(".")[1] for name in dropped} == {"1", "2", "4"}
    uvit = random_model(replace(UVIT, depth=6))
    shallow, weights = start(uvit, depth=4).weights, uvit.state_dict()
    for block, source in [("in_blocks.1", "in_blocks.2"), ("out_blocks.0", "out_blocks.0")]:
        assert torch.equal(shallow[f"{block}.mlp.fc1.weight"], weights[f"{source}.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("part", "prefix"),
    [("labels", "y_embedder"), ("embedding", "x_embedder"), ("final", "final_layer"), ("positions", "pos_embed")],
)
def test_a_part_that_is_reset_is_fresh_and_nothing_else(part, prefix):
    base = random_model(SMALL)
    started, fresh = start(base, reset=(part,)), random_model(SMALL, seed=9).state_dict()
    assert table(started)["fresh"] == {name for name in fresh if name.startswith(prefix)}
    for name, tensor in started.weights.items():
        source = fresh if name.startswith(prefix) else base.state_dict()
        assert torch.equal(tensor, source[name])


def test_other_latent_channels_need_both_ends_to_be_reset():
    base = random_model(SMALL)
    with pytest.raises(InvalidInput, match="latents with 4 channels.*8"):
        start(base, in_channels=8, reset=("embedding",))
    started = start(base, in_channels=8, reset=("embedding", "final"))
    assert {name.split(".")[0] for name in table(started)["fresh"]} == {"x_embedder", "final_layer"}


def test_another_objective_needs_to_be_reset_and_another_process_gets_new_timesteps():
    base = random_model(SMALL)
    v, fixed = ({"kind": "diffusion", "prediction": p, "variance": "fixed_small"} for p in ("v", "eps"))
    with pytest.raises(InvalidInput, match=r"objective\.prediction: found 'v'.*'eps'"):
        start(base, objective=v, base_objective=fixed)
    assert set(table(start(base, objective=v, base_objective=fixed, reset=("objective",)))) == {"equal"}
    with pytest.raises(InvalidInput, match=r"objective\.kind: found 'flow'.*'diffusion'"):
        start(base, objective=FLOW, base_objective=fixed)
    started = start(base, objective=FLOW, base_objective=fixed, reset=("objective",))
    assert {name.split(".")[0] for name in table(started)["fresh"]} == {"t_embedder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"model\.hidden_size: found 32, expected 16"),
        ({"num_heads": 4}, r"model\.num_heads: found 4, expected 2"),
        ({"mlp_ratio": 2.0}, r"model\.mlp_ratio: found 2\.0, expected 4\.0"),
        ({"conditioning": "adaln"}, r"model\.conditioning: found 'adaln', expected 'adaln_zero'"),
        ({"qk_norm": True}, r"model\.qk_norm: found True, expected False.*Set model\.qk_norm = false"),
        ({"norm": "rms"}, r"model\.norm"),
        ({"mlp": "swiglu"}, r"model\.mlp: found 'swiglu'"),
        ({"position": "rope"}, r'model\.position: found \'rope\'.*reset = \["positions"\]'),
        ({"timestep_frequency_shift": 1}, r"model\.timestep_frequency_shift: found 1, expected 0"),
        ({"head_width": 20, "head_depth": 1}, r"model\.head_width: found 20, expected None.*[Rr]emove"),
        ({"config": UVIT}, r"model\.architecture: found 'uvit', expected 'dit'"),
        ({"classes": ("x", "y", "z")}, r"classes a, b, c, none of which.*x, y, z"),
        ({"classes": (), "num_classes": 0}, "found a model with classes, expected none"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_the_name_of_the_field(changes, message):
    with pytest.raises(InvalidInput, match=message):
        start(random_model(SMALL), **changes)


def test_rotary_positions_can_replace_a_table_that_is_reset():
    base = random_model(SMALL)
    assert table(start(base, position="rope", reset=("positions",)))["dropped"] == {"pos_embed"}
    rope = random_model(replace(SMALL, position="rope"))
    assert table(start(rope, position="sincos", reset=("positions",)))["fresh"] == {"pos_embed"}


def test_the_summary_has_a_line_for_each_group_of_tensors():
    lines = list(summarize_fates(start(random_model(SMALL), depth=2, classes=("a", "d"), num_classes=2).fates))
    assert [line.split()[0] for line in lines] == [
        "pos_embed",
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "blocks",
        "final_layer",
    ]
    assert lines[0].endswith("1 equal") and "10 equal, 10 adapted, 10 dropped (copy of blocks.2)" in lines[4]
    assert "1 of 2 classes by name" in lines[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rms"}, r"model\.norm: found 'rms', expected 'layer'"),
        ({"conditioning": "in_context"}, r"model\.conditioning: found 'in_context', expected 'adaln_zero'"),
        ({"hidden_size": 32}, r"model\.hidden_size: found 32, expected 16"),
    ],
)
def test_a_start_with_the_epsilon_of_diffusers_names_the_field_that_differs(changes, message):
    """No recipe has mlp_norm_eps, which a model takes over from its start where it can."""
    base = replace(SMALL, mlp_norm_eps=1e-5)
    assert with_inherited_fields(SMALL, base) == base
    config = with_inherited_fields(replace(SMALL, **changes), base)
    with pytest.raises(InvalidInput, match=message):
        require_adaptable(TrainedModel(base, FLOW, CLASSES), TrainedModel(config, FLOW, CLASSES), ())


def test_a_u_vit_takes_over_what_its_recipe_leaves_out_and_is_refused_where_it_sets_another_value():
    base = replace(UVIT, qkv_bias=True, mlp_time_embed=True, final_conv=False, first_timestep=1)
    assert with_inherited_fields(UVIT, base) == with_inherited_fields(UVIT, base, ["depth"]) == base
    assert with_inherited_fields(replace(UVIT, qkv_bias=True), base, ["qkv_bias"]) == base
    for name in ("qkv_bias", "mlp_time_embed", "final_conv"):
        value = getattr(UVIT, name)
        config = with_inherited_fields(UVIT, base, [name])
        expected = str(not value).lower()
        message = rf"model\.{name}: found {value}, expected {not value}, as in.*[Ss]et model\.{name} = {expected}"
        with pytest.raises(InvalidInput, match=message):
            require_adaptable(TrainedModel(base, FLOW, CLASSES), TrainedModel(config, FLOW, CLASSES), ())
