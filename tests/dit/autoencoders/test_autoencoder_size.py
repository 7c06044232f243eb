"""Arithmetic and parameters of autoencoders, compared with diffusers' networks."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit.autoencoder import create_autoencoder
from dit.autoencoders.kinds import downsample
from dit.autoencoders.size import STABLE_DIFFUSION_CONFIG, decoder_size, encoder_size, own_config

OWN = {"latent_channels": 4, "downsample": 4, "width": 16}
SIDE = 32


def kl(channels=(16, 24, 32), layers=2, **further):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=8,
        **further,
    )


def tiny():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    )


@pytest.mark.parametrize(
    "create",
    [
        kl,
        tiny,
        lambda: kl(channels=(8, 16), layers=1, latent_channels=3),
        lambda: kl(use_quant_conv=False, use_post_quant_conv=False),
        lambda: create_autoencoder(image_size=SIDE, **OWN),
    ],
    ids=["kl", "tiny", "two-levels", "without-quant-conv", "own"],
)
def test_macs_and_parameters_equal_those_that_torch_counts(create):
    module = create().eval()
    config = dict(module.config) | {"_class_name": type(module).__name__}
    small = SIDE // downsample(config)
    parts = {
        ("encoder", "quant"): (encoder_size, lambda: module.encode(torch.zeros(1, 3, SIDE, SIDE))),
        ("decoder", "post_quant"): (
            decoder_size,
            lambda: module.decode(torch.zeros(1, config["latent_channels"], small, small)),
        ),
    }
    for names, (size_of, run) in parts.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        size = size_of(config, SIDE)
        assert 2 * size.macs == counter.get_total_flops()
        assert size.parameters == sum(p.numel() for name, p in module.named_parameters() if name.startswith(names))


def test_own_config_is_that_of_create_autoencoder():
    module = create_autoencoder(image_size=SIDE, **OWN)
    expected = own_config(**OWN)
    assert {"_class_name": type(module).__name__, **module.config} == dict(module.config) | expected


def test_stable_diffusions_autoencoder_has_its_published_parameters():
    encoder, decoder = (size(STABLE_DIFFUSION_CONFIG, 256) for size in (encoder_size, decoder_size))
    assert encoder.parameters + decoder.parameters == 83_653_863
    assert downsample(STABLE_DIFFUSION_CONFIG) == 8
    assert decoder.largest == 256 * 256 * 256  # of the last up-sampling
