"""What files claim is held against the bytes that are there, before memory is taken for it."""

import json

import pytest
import torch

from dit.autoencoder import Autoencoder, LatentScale, create_autoencoder, describe_autoencoder, save_autoencoder
from dit.config import DiTConfig, UViTConfig, config_from_dict
from dit.formats.official import _latent_size, read_official
from dit.formats.weights import read_weights
from dit.layers.embeddings import position_embedding
from dit.model import DiT
from raydit.errors import InvalidInput


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 10**9),
        ("hidden_size", 1 << 40),
        ("in_channels", 10**10),
        ("input_size", 1 << 20),
        ("num_classes", 10**12),
        ("mlp_ratio", float("inf")),
        ("mlp_ratio", float("nan")),
        ("num_heads", True),
        ("depth", "28"),
        ("depth", 2.5),
        ("depth", None),
        ("depth", [28]),
        ("input_size", [32, 32, 32]),
        ("input_size", [32]),
        ("input_size", []),
        ("input_size", [[32, 32], 32]),
        ("input_size", "32"),
        ("learn_sigma", "no"),
        ("class_dropout_prob", "0.1"),
    ],
)
def test_a_configuration_from_elsewhere_has_types_and_bounds(field, value):
    with pytest.raises(InvalidInput, match=f"{field} is .*expected .*"):
        config_from_dict({field: value})
    if field != "learn_sigma":
        with pytest.raises(InvalidInput, match=f"{field} is "):
            UViTConfig(**{field: tuple(value) if isinstance(value, list) else value})


def test_an_architecture_that_is_no_text_is_refused():
    with pytest.raises(InvalidInput, match=r"architecture is \[\], expected one of dit, uvit"):
        config_from_dict({"architecture": []})


def test_a_table_of_one_row_that_claims_to_be_a_billion_is_refused(tmp_path):
    """By a stride of 0; and by many views of one tensor."""
    model = DiT(DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)).state_dict()
    expanded = torch.zeros(1, 16).expand(10**9, 16)
    torch.save(model | {"y_embedder.embedding_table.weight": expanded}, tmp_path / "stride.pt")
    shared = torch.zeros(1 << 20)
    torch.save({"model": {f"w{index}": shared for index in range(20)}}, tmp_path / "shared.pt")
    assert (tmp_path / "stride.pt").stat().st_size < 100_000
    for name in ("stride.pt", "shared.pt"):
        with pytest.raises(InvalidInput, match=rf"{name}: found tensors of [\d,]+ bytes in a file of"):
            read_weights(tmp_path / name)
    with pytest.raises(InvalidInput, match="found tensors of"):
        read_official(tmp_path / "stride.pt")


def test_tied_weights_are_read(tmp_path):
    shared = torch.randn(64, 64)
    torch.save({"model": {"a": shared, "b": shared}, "ema": {"a": shared}}, tmp_path / "tied.pt")
    assert torch.equal(read_weights(tmp_path / "tied.pt")["model"]["b"], shared)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (4, 16), (16, 4), (1, 12), (12, 1), (710, 2), (2, 710), (6, 44)])
@pytest.mark.parametrize("width", [4, 16])
def test_a_grid_is_found_from_its_table(rows, columns, width):
    table = position_embedding(width, rows, columns)[None].half()
    found = _latent_size(table, 2)
    assert found == (2 * rows if rows == columns else (2 * rows, 2 * columns))


def test_a_table_of_many_divisors_is_judged_at_once():
    """720,720 positions have 240 divisors, and each stood for a grid to compare with: 160 GB were computed."""
    table = torch.zeros(1, 720_720, 4)
    with pytest.raises(ValueError, match="720720 positions do not form a grid"):
        _latent_size(table, 2)


@pytest.fixture
def vae(tmp_path):
    save_autoencoder(
        create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8),
        tmp_path / "vae",
        LatentScale((0.0,) * 4, (1.0,) * 4),
    )
    return tmp_path / "vae"


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"latent_channels": 10**10},
        {"layers_per_block": 60_000},
        {"block_out_channels": [1 << 30] * 2},
        {"block_out_channels": [8] * 100_000},
        {"norm_num_groups": float("inf")},
    ],
)
def test_the_config_of_an_autoencoder_has_bounds(vae, fields):
    change_config(vae, **fields)
    for use in (describe_autoencoder, Autoencoder.load):
        with pytest.raises(InvalidInput, match=r"config.json: .*found .* at most"):
            use(vae)


def test_a_config_that_claims_more_weights_than_there_are_takes_no_memory(vae):
    """It took the 90 GB that the config claims."""
    change_config(vae, block_out_channels=[32768, 65536])
    with pytest.raises(InvalidInput, match=r"config.json: found the AutoencoderKL of .* the [\d,]+ bytes beside it"):
        Autoencoder.load(vae)


@pytest.mark.parametrize("content", ["[]", "5", "[" * 100_000, '{"block_out_channels": "x"}', '{"norm_num_groups": 0}'])
def test_what_is_no_config_of_an_autoencoder_is_told(vae, content):
    (vae / "config.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"config.json: found"):
        Autoencoder.load(vae)
