import pytest
import torch

from dit.config import UVIT_NAMES, UViTConfig, named_config
from dit.diffusion import GaussianDiffusion
from dit.layers.embeddings import timestep_embedding
from dit.model import create_model
from dit.samplers import guided
from dit.uvit import UViT


@pytest.fixture(scope="module")
def uvit_a(golden):
    """The reference's small U-ViT with the reference's weights; its count of 11 labels includes the null class."""
    official = golden("configs.json")["uvit_a"]
    config = UViTConfig(
        input_size=official["img_size"],
        patch_size=official["patch_size"],
        in_channels=official["in_chans"],
        hidden_size=official["embed_dim"],
        depth=official["depth"],
        num_heads=official["num_heads"],
        mlp_ratio=official["mlp_ratio"],
        num_classes=official["num_classes"] - 1,
        qkv_bias=official["qkv_bias"],
        mlp_time_embed=official["mlp_time_embed"],
        final_conv=official["conv"],
    )
    model = UViT(config)
    model.load_state_dict(golden("uvit_a.state_dict.safetensors"))
    return model.eval()


def test_forward_equals_the_reference(uvit_a, golden):
    io = golden("uvit_a.io.safetensors")
    with torch.no_grad():
        out = uvit_a(io["x"], io["t"], io["y"])
    torch.testing.assert_close(out, io["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "paper"),
    [("U-ViT-S/2", 44), ("U-ViT-S-Deep/2", 58), ("U-ViT-M/4", 131), ("U-ViT-L/2", 287), ("U-ViT-H/2", 501)],
)
def test_parameter_counts_equal_those_of_the_paper(name, paper):
    # S is the paper's CIFAR-10 model and S-Deep its text-to-image model: neither has a label table.
    unlabelled = {"num_classes": 0} if name.startswith("U-ViT-S") else {}
    with torch.device("meta"):
        model = create_model(name, **unlabelled)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == paper


def test_sizes_are_named_with_both_patch_sizes():
    assert len(UVIT_NAMES) == 10
    for name in UVIT_NAMES:
        config = named_config(name, num_classes=10)
        assert isinstance(config, UViTConfig)
        assert name.endswith(f"/{config.patch_size}") and config.num_labels == 11
    assert [name for name in UVIT_NAMES if not named_config(name).final_conv] == ["U-ViT-H/2", "U-ViT-H/4"]


def test_initialisation_is_normal_with_zero_biases():
    torch.manual_seed(0)
    state = UViT(UViTConfig(input_size=8, hidden_size=128, depth=2, num_heads=4)).state_dict()
    for name in ("pos_embed", "mid_block.attn.qkv.weight", "out_blocks.0.skip_linear.weight", "decoder_pred.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.05)
    assert not any(state[name].any() for name in ("mid_block.attn.proj.bias", "out_blocks.0.skip_linear.bias"))
    assert state["label_emb.weight"].std() == pytest.approx(1, rel=0.05)


def test_positions_are_learned():
    model = UViT(UViTConfig(input_size=(4, 8), hidden_size=16, depth=2, num_heads=2, num_classes=0))
    model(torch.randn(1, 4, 4, 8), torch.zeros(1)).square().mean().backward()
    assert model.pos_embed.shape == (1, 1 + 2 * 4, 16)
    assert model.pos_embed.grad.abs().amax(dim=2).min() > 0


def test_label_and_timestep_come_before_the_patches(small_model):
    model, seen = small_model(architecture="uvit"), []
    model.in_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0] - model.pos_embed))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 9])
    model(x, t, y)
    expected = [model.label_emb(y)[:, None], timestep_embedding(t, 32)[:, None], model.patch_embed(x)]
    torch.testing.assert_close(seen[0], torch.cat(expected, dim=1))


def test_blocks_use_the_exact_gelu(small_model):
    mlp, x = small_model(architecture="uvit").mid_block.mlp, torch.randn(2, 3, 32)
    hidden = mlp.fc1(x)
    expected = mlp.fc2(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_a_skip_connects_each_shallow_block_to_the_deep_one_of_the_same_depth(small_model):
    model = small_model(architecture="uvit", depth=6)
    given = {}
    for kind in ("in_blocks", "out_blocks"):
        for index, block in enumerate(getattr(model, kind)):
            block.register_forward_hook(lambda _, args, out, key=(kind, index): given.update({key: (args, out)}))
    model(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    for index in range(3):
        (_, skip), _ = given["out_blocks", index]
        assert torch.equal(skip, given["in_blocks", 2 - index][1])


def test_guidance_finds_the_null_class(small_model):
    model = small_model(architecture="uvit")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 9])
    labelled, unlabelled = model(x, t, y), model(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(guided(model, 3.0)(x, t, y), unlabelled + 3 * (labelled - unlabelled))


def test_a_learned_variance_is_refused_and_a_fixed_one_accepted(small_model):
    model = small_model(architecture="uvit")
    batch = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 9]), torch.randn(2, 4, 8, 8)
    losses = GaussianDiffusion(schedule="scaled_linear", variance="fixed_small").training_losses(model, *batch)
    assert losses["loss"].isfinite().all()
    with pytest.raises(ValueError, match='Use learn_sigma with "learned_range"'):
        GaussianDiffusion(variance="learned_range").training_losses(model, *batch)


@pytest.mark.parametrize(
    ("fields", "found", "expected", "advice"),
    [
        ({"depth": 13}, "depth is 13", "expected an even number", "Do not count the middle block"),
        ({"num_heads": 7}, "hidden_size is 1152", "multiple of num_heads = 7", "Change hidden_size"),
        ({"hidden_size": 15, "num_heads": 3}, "hidden_size is 15", "and of 2", "Change hidden_size"),
        ({"patch_size": 3}, "32x32", "multiples of patch_size = 3", "Choose another patch_size"),
        ({"architecture": "dit"}, "architecture is 'dit'", "one of uvit", "did you mean 'uvit'?"),
    ],
)
def test_errors_say_what_was_found_and_expected_and_what_to_do(fields, found, expected, advice):
    with pytest.raises(ValueError) as error:
        UViTConfig(**fields)
    assert all(part in str(error.value) for part in (found, expected, advice)), str(error.value)
