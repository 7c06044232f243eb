"""The wide head: its sizes, its start at zero, what reaches it, and that a model without one is unchanged."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from compile_counter import CompileCounter

from dit.compilation import repeated_blocks
from dit.conditions import Conditions
from dit.config import DiTConfig, UViTConfig, config_from_dict, named_config, recorded_fields
from dit.distributed import shard_network
from dit.float8 import float8_layers, require_float8_shapes
from dit.flow import FlowMatching
from dit.formats.record import model_label
from dit.macs import forward_macs
from dit.model import DiT, create_model
from dit.schedule import TrainingConfig
from dit.train import create_state, train_step
from raydit.errors import InvalidInput

HEAD = {"head_width": 128, "head_depth": 2}
REFINED = {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "position": "rope"}
SMALL = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


def awake(**fields):
    """Return a model whose weights are small and none of them zero: gates that are zero would hide the blocks."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**SMALL, **HEAD, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(count=3):
    return torch.randn(count, 4, 8, 8), torch.rand(count), torch.arange(count) % 10


def test_the_papers_largest_model_has_its_number_of_parameters():
    """These are 839 M on the 768 x 16 x 16 latents of DINOv2-B, with RMS norms, SwiGLU and rotary positions."""
    latents = {"input_size": 16, "patch_size": 1, "in_channels": 768, "learn_sigma": False}
    with torch.device("meta"):
        model = create_model("DiT-XL/2", **latents, head_width=2048, head_depth=2, **{**REFINED, "qk_norm": False})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == pytest.approx(839e6, rel=0.01)
    assert model.head.blocks[0].attn.num_heads == 16


@pytest.mark.parametrize("options", [{}, REFINED], ids=["plain", "refined"])
def test_a_fresh_model_computes_what_one_without_a_head_does(options):
    model, plain = DiT(DiTConfig(**SMALL, **HEAD, **options)), DiT(DiTConfig(**SMALL, **options))
    assert torch.equal(model(*inputs()), plain(*inputs()))
    x, c = torch.randn(2, 16, 128), torch.randn(2, 16, 128)
    for block in model.head.blocks:
        assert torch.equal(block(x, c, model.head.rotation), x)


def test_a_model_without_a_head_has_the_names_and_the_record_of_before():
    config = DiTConfig(**SMALL)
    recorded = recorded_fields(config)
    assert not {"head_width", "head_depth"} & recorded.keys() and config_from_dict(recorded) == config
    assert recorded.keys() | {"head_width", "head_depth", "flow_time"} == dataclasses.asdict(config).keys()
    with torch.device("meta"):
        plain, wide = DiT(config), DiT(DiTConfig(**SMALL, **HEAD))
    assert not any(name.startswith("head.") for name in plain.state_dict())
    trunk = {name for name in plain.state_dict() if not name.startswith("final_layer.")}
    ends = ("head.", "final_layer.")
    assert trunk == {name for name in wide.state_dict() if not name.startswith(ends)}


def test_a_block_is_that_of_adaln_zero_with_a_condition_for_each_token(small_model):
    """With one condition for all tokens it equals the formulas of AdaLNZeroBlock with the same weights."""
    model = small_model(hidden_size=64, depth=1, num_heads=1, head_width=64, head_depth=1).double()
    head, block = model.head.blocks[0], model.blocks[0]
    weights = {name.replace("token_modulation", "adaLN_modulation"): value for name, value in head.state_dict().items()}
    block.load_state_dict(weights)
    x, c = torch.randn(2, 16, 64).double(), torch.randn(2, 64).double()
    torch.testing.assert_close(head(x, c[:, None].expand(-1, 16, -1)), block(x, c))
    # A token's condition modulates the token itself; others see it through attention alone.
    torch.nn.init.zeros_(head.attn.proj.weight)
    expected = head(x, c[:, None].expand(-1, 16, -1))
    moved = c[:, None].repeat(1, 16, 1)
    moved[:, 3] += 1
    change = (head(x, moved) - expected).abs().amax(dim=(0, 2))
    assert change.nonzero().flatten().tolist() == [3]


def test_the_output_is_what_the_formulas_give(small_model):
    model = small_model(**HEAD)
    x, t, y = inputs()
    seen = {}
    model.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(trunk=out))
    out = model(x, t, y)
    head, c = model.head, model.t_embedder(t) + model.y_embedder(y)
    condition = head.projection(F.silu(seen["trunk"] + c[:, None]))
    tokens = head.x_embedder(x) + head.positions
    for block in head.blocks:
        tokens = block(tokens, condition)
    shift, scale = model.final_layer.token_modulation(condition).chunk(2, dim=-1)
    patches = model.final_layer.linear(F.layer_norm(tokens, (128,), eps=1e-6) * (1 + scale) + shift)
    first = patches[:, 0].view(-1, 2, 2, 8).permute(0, 3, 1, 2)  # the channel is last inside of a patch
    torch.testing.assert_close(out[:, :, :2, :2], first)


@pytest.mark.parametrize("options", [{}, REFINED, {"gradient_checkpointing": True}], ids=["plain", "refined", "again"])
def test_gradients_reach_all_parameters(options):
    model, batch = awake(**options), inputs()
    model(*batch).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    if "gradient_checkpointing" in options:
        kept = awake()
        kept(*batch).square().mean().backward()
        assert all(map(torch.equal, gradients, (p.grad for p in kept.parameters() if p.requires_grad)))


@pytest.mark.parametrize("options", [{}, REFINED], ids=["plain", "refined"])
def test_latents_timestep_and_label_reach_the_output_of_each_image_alone(options):
    model, (x, t, y) = awake(**options), inputs(16)
    out = model(x, t, y)
    for other in ((x + 1, t, y), (x, t + 0.5, y), (x, t, torch.full_like(y, model.null_class))):
        assert (model(*other) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(out[5:6], model(x[5:6], t[5:6], y[5:6]), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(x, t, y)
    for each in (under_autocast, model.bfloat16()(x.bfloat16(), t, y)):
        assert (each.float() - out).abs().max() < 0.05 * out.abs().max()


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    settings = TrainingConfig(steps=12, global_batch_size=16, learning_rate=5e-3)
    state = create_state(DiT(DiTConfig(**SMALL, head_width=64, head_depth=1, learn_sigma=False)), settings)
    latents, noise, t, labels = torch.randn(16, 4, 1, 1).expand(-1, -1, 8, 8), *inputs(16)
    process, labels = FlowMatching(), Conditions(labels)

    def losses(network, batch):
        return {"loss": process.training_losses(network, batch, t, labels, noise)["loss"].mean()}

    first, *_, last = [float(train_step(state, latents, losses, settings)["loss"]) for _ in range(12)]
    assert last < 0.7 * first


def test_head_blocks_are_a_kind_of_their_own_for_compilation(small_model):
    torch.compiler.reset()
    counter, model = CompileCounter(), small_model(**HEAD)
    assert [type(block).__name__ for block in repeated_blocks(model)] == ["AdaLNZeroBlock"] * 2 + ["HeadBlock"] * 2
    batch = inputs()
    expected = model(*batch)
    torch.testing.assert_close(counter.compile(model)(*batch), expected, rtol=1e-4, atol=1e-5)
    assert counter.forward == 2
    torch.compiler.reset()


def test_fsdp_shards_the_blocks_of_the_head_one_by_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model, batch = awake(), inputs()
        expected = model(*batch)
        sharded = shard_network(model)
        assert all(hasattr(block, "reshard") for block in (*model.blocks, *model.head.blocks))
        torch.testing.assert_close(sharded(*batch), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_float8_takes_the_modulation_of_each_token_as_well():
    config = DiTConfig(**SMALL, **HEAD)
    layers = float8_layers(DiT(config))
    parts = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    expected = {f"blocks.{index}.{part}" for index in range(2) for part in parts}
    expected |= {f"head.blocks.{index}.{part}" for index in range(2) for part in parts | {"token_modulation.1"}}
    assert layers.keys() == expected
    require_float8_shapes(config)
    with pytest.raises(InvalidInput, match=r"model of head_width = 24, expected a multiple of 16"):
        require_float8_shapes(dataclasses.replace(config, head_width=24))


def test_a_head_costs_its_formula():
    """36 W^2 for each token in two blocks, D W for the projection, and attention; the final layer is wider."""
    plain, wide = (named_config("DiT-XL/2", **head) for head in ({}, {"head_width": 2048, "head_depth": 2}))
    tokens, width, trunk = 256, 2048, 1152
    head = tokens * (36 * width**2 + trunk * width) + 2 * 2 * tokens**2 * width
    ends = tokens * width * (16 + 32) + 2 * tokens * width**2 - tokens * trunk * 32 - 2 * trunk**2
    assert forward_macs(wide) - forward_macs(plain) == head + ends


def test_a_checkpoint_builds_the_head_again(small_model, save_model, rebuilt):
    model = small_model(**HEAD, **REFINED)
    checkpoint = save_model(model)
    recorded = json.loads((checkpoint.path / "config.json").read_text())["model"]
    assert (recorded["head_width"], recorded["head_depth"]) == (128, 2)
    batch = inputs()
    again = rebuilt(checkpoint, "model")
    assert again.config == model.config and torch.equal(again(*batch), model(*batch))
    assert "with a head of width 128 and depth 2" in model_label(recorded, None)


@pytest.mark.parametrize(
    ("fields", "found", "expected", "advice"),
    [
        ({"head_width": 128}, "head_width is 128 without head_depth", "both", "Set head_depth, or remove head_width"),
        ({"head_depth": 2}, "head_depth is 2 without head_width", "both", "Set head_width, or remove head_depth"),
        ({**HEAD, "conditioning": "in_context"}, "conditioning = 'in_context'", "'adaln_zero'", "Remove conditioning"),
        ({**HEAD, "head_width": 200}, "head_width is 200", "a multiple of 128", "Set head_width to 256"),
        ({**HEAD, "head_width": 18}, "head_width is 18", "a multiple of 4 below 128", "Set head_width to 20"),
        ({**HEAD, "head_depth": 0}, "head_depth is 0", "a number above 0", "positive"),
        ({**HEAD, "head_width": "wide"}, "head_width is 'wide'", "an integer", "Correct head_width"),
        ({**HEAD, "head_width": 1 << 40}, "head_width is 1,099,511,627,776", "at most", "Correct head_width"),
        ({**HEAD, "architecture": "uvit"}, "head_width is not a field of a uvit model", "one of", "Choose one"),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(fields, found, expected, advice):
    with pytest.raises(InvalidInput) as error:
        config_from_dict(fields)
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)
    assert not hasattr(UViTConfig(), "head_width")
