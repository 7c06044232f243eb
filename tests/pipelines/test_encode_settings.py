"""What [encode] chooses reaches the autoencoder, and the identity of the latents if it changes bytes."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import tiny_recipe

from pipelines.config import EncodeConfig
from pipelines.encode import EncodeImages, encode_identity
from pipelines.identity import differences
from pipelines.images import Listing

LISTING = Listing(["a", "b"], np.zeros(2, np.int32), np.zeros(2, np.int64), ("one",))


def identity(folder, *overrides):
    return encode_identity(tiny_recipe(folder, *overrides), LISTING, {"sha256": "ab"})


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("encode.memory_format=channels_last", ['encode.memory_format: null -> "channels_last"']),
        ("encode.dtype=bfloat16", ['encode.dtype: "float32" -> "bfloat16"']),
        ("encode.memory_format=contiguous", []),
        ("encode.num_workers=2", []),
    ],
)
def test_latents_depend_on_what_changes_their_bytes_and_on_nothing_else(tmp_path, override, change):
    assert differences(identity(tmp_path), identity(tmp_path, override)) == change


@pytest.fixture
def tiny_autoencoder(tmp_path):
    torch.manual_seed(0)
    widths, blocks = (8, 8), (1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def encoded(folder, images, **settings):
    config = EncodeConfig(batch_size=2, **settings)
    worker = EncodeImages(folder, config)
    return worker, worker({"images": images})


def test_the_layout_and_precision_that_were_asked_for_make_the_same_latents(tiny_autoencoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    _, plain = encoded(tiny_autoencoder, images)
    worker, other = encoded(tiny_autoencoder, images, dtype="bfloat16", memory_format="channels_last")
    weight = worker.autoencoder.module.encoder.layers[0].weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    for name in ("moments", "moments_flip"):
        assert plain[name].shape == (3, 8, 4, 4) and plain[name].dtype == other[name].dtype == np.float16
        assert plain[name].flags.c_contiguous and other[name].flags.c_contiguous
        np.testing.assert_allclose(other[name], plain[name], atol=0.05 * np.abs(plain[name][:, :4]).max())
