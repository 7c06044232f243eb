"""Digests of a diffusers autoencoder beside that of its weights file: of its tensors, and of its config.

Latents and checkpoints record them, but no fingerprint and no protocol contains them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from dit.autoencoders.size import read_config
from dit.formats.diffusers_files import find_weights

_COMMON: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
COMPUTING_FIELDS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **_COMMON,
        "act_fn": "silu",
        "block_out_channels": [64],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "AutoencoderTiny": {
        **_COMMON,
        "act_fn": "relu",
        "decoder_block_out_channels": [64, 64, 64, 64],
        "encoder_block_out_channels": [64, 64, 64, 64],
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": [3, 3, 3, 1],
        "num_encoder_blocks": [1, 3, 3, 3],
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    },
    "AutoencoderKLFlux2": {
        **_COMMON,
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "decoder_block_out_channels": None,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 32,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "patch_size": [2, 2],
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "decoder_conv_act_fn": "relu",
    },
    "AutoencoderRAE": {
        "num_channels": 3,
        "encoder_type": "dinov2",
        "encoder_hidden_size": 768,
        "encoder_patch_size": 14,
        "encoder_num_hidden_layers": 12,
        "encoder_input_size": 224,
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 8,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 2048,
        "patch_size": 16,
        "reshape_to_2d": True,
    },
}
"""Fields of diffusers' configs that the result depends on, by class, with diffusers' defaults.

The scale of the latents is recorded by itself, `force_upcast` and `sample_size` are read by pipelines only, and of an
AutoencoderRAE the weights hold the normalisation of its input, and the other sizes give that of its images.
"""


def config_sha256(folder: Path) -> str:
    """Return the sha256 of the fields of an autoencoder's config that its result depends on.

    A field that has diffusers' default counts as left out, because tools that save a config again write it out.
    """
    config = read_config(folder)
    name = config.get("_class_name", "AutoencoderKL")
    given = {field: config.get(field, default) for field, default in COMPUTING_FIELDS[name].items()}
    fields = {field: value for field, value in given.items() if value != COMPUTING_FIELDS[name][field]}
    return hashlib.sha256(json.dumps([name, fields], sort_keys=True).encode()).hexdigest()


def further_digests(folder: Path) -> dict[str, str]:
    """Return the digests that are recorded beside that of the weights file.

    That of the tensors stays when another tool loads the weights and saves them again.
    """
    return {"tensors_sha256": find_weights(folder).tensors_sha256, "config_sha256": config_sha256(folder)}
