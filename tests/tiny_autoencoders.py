"""Tiny autoencoders of every supported class of diffusers with random weights, and scales that are not trivial."""

from pathlib import Path

import pytest
import torch

LEVELS = 3
SIDE = 16
"""Pixels of the images that all of them take unless another side is asked for."""
CHANNELS = {"AutoencoderKL": 4, "AutoencoderKLFlux2": 4, "AutoencoderDC": 8, "AutoencoderRAE": 64}


def write_autoencoder(name: str, folder: Path, side: int = SIDE) -> torch.nn.Module:
    """Write a diffusers folder of a class, the same in every call, and return the module. Skips what is not installed.

    All have latents of a quarter of the images' side. side: of the images, in pixels.
    """
    if name == "AutoencoderRAE":
        pytest.importorskip("transformers")
    import diffusers

    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(diffusers, name)(**fields(name, generator, side)).eval()
    if name == "AutoencoderKLFlux2":
        module.bn.running_mean.copy_(torch.randn(16, generator=generator))
        module.bn.running_var.copy_(torch.rand(16, generator=generator) + 0.5)
    module.save_pretrained(folder)
    return module


def fields(name: str, generator: torch.Generator, side: int = SIDE) -> dict:
    """The config of a tiny autoencoder."""
    if name in ("AutoencoderKL", "AutoencoderKLFlux2"):
        kl = {
            "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
            "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
        }
        # As VA-VAE has: statistics of the channels instead of a scaling factor.
        statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.5, 0.5, 1.0, 3.0]}
        return kl | (statistics | {"scaling_factor": 1.0} if name == "AutoencoderKL" else {"batch_norm_eps": 1e-4})
    if name == "AutoencoderDC":
        return {
            "latent_channels": 8,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 16, 16),
            "decoder_block_out_channels": (8, 16, 16),
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "encoder_qkv_multiscales": ((), (), (5,)),
            "decoder_qkv_multiscales": ((), (), (5,)),
            "scaling_factor": 0.41407,
        }
    return {
        "encoder_hidden_size": 64,
        "encoder_patch_size": 7,
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 7 * side // 4,
        "patch_size": 4,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 48,
        "latents_mean": torch.randn(64, side // 4, side // 4, generator=generator),
        "latents_std": torch.rand(64, side // 4, side // 4, generator=generator) + 0.5,
    }
