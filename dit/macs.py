"""Number of multiply-accumulates (MACs) of a forward pass. Imports no torch.

Only matrix products count (linear layers, attention, convolutions), not element-wise operations such as norms and
rotations. A training step costs three forward passes: 6 * forward_macs FLOPs per image.
"""

from dit.config import TIMESTEP_FREQUENCIES, DiTConfig, UViTConfig


def forward_macs(config: DiTConfig | UViTConfig) -> int:
    """Return the multiply-accumulates of a forward pass on one image; FLOPs are twice this number.

    The "Gflops" in Peebles & Xie 2022 are these multiply-accumulates: 118.6 G for DiT-XL/2.
    """
    return uvit_macs(config) if isinstance(config, UViTConfig) else dit_macs(config)


def dit_macs(config: DiTConfig) -> int:
    """Return the multiply-accumulates of a DiT on one image: the "Gflops" of Peebles & Xie 2022, table 1."""
    width = config.hidden_size
    timestep_mlp = TIMESTEP_FREQUENCIES * width + width**2
    if config.head is not None:
        patches = config.num_tokens * width * config.patch_size**2 * config.in_channels
        return patches + timestep_mlp + trunk_macs(config) + wide_head_macs(config.head, width)
    final_modulation = 2 * width**2 if config.conditioning in ("adaln_zero", "adaln") else 0
    return trunk_macs(config) + final_modulation + end_macs(config) + timestep_mlp


def trunk_macs(config: DiTConfig) -> int:
    """Return the multiply-accumulates of all blocks of a DiT on one image."""
    width, tokens, conditions = config.hidden_size, config.num_tokens, config.num_conditions
    block_tokens = tokens + conditions if config.conditioning == "in_context" else tokens
    conditioning = {
        "adaln_zero": 6 * width**2,
        "adaln": 4 * width**2,
        "cross_attention": 2 * (tokens + conditions) * width**2 + 2 * tokens * conditions * width,
        "in_context": 0,
    }[config.conditioning]
    return config.depth * (self_attention_macs(block_tokens, width) + mlp_macs(config, block_tokens) + conditioning)


def wide_head_macs(head: DiTConfig, trunk_width: int) -> int:
    """Return the multiply-accumulates of a wide head on one image, with all of its modulations once for each token."""
    width, tokens = head.hidden_size, head.num_tokens
    block = self_attention_macs(tokens, width) + mlp_macs(head, tokens) + 6 * tokens * width**2
    return tokens * trunk_width * width + head.depth * block + 2 * tokens * width**2 + end_macs(head)


def mlp_macs(config: DiTConfig, tokens: int) -> int:
    """Return the multiply-accumulates of the feed-forward layer of a DiT's block: two linear layers, or three."""
    return (3 if config.mlp == "swiglu" else 2) * tokens * config.hidden_size * config.mlp_size


def uvit_macs(config: UViTConfig) -> int:
    """Return the multiply-accumulates of a U-ViT on one image (Bao et al. 2022, https://arxiv.org/abs/2209.12152)."""
    width, tokens = config.hidden_size, config.num_tokens + config.num_conditions
    block = self_attention_macs(tokens, width) + 2 * tokens * width * config.mlp_size
    skip = 2 * tokens * width**2
    timestep_mlp = 8 * width**2 if config.mlp_time_embed else 0
    height, columns = config.latent_size
    final_conv = 9 * config.in_channels**2 * height * columns if config.final_conv else 0
    return (config.depth + 1) * block + config.depth // 2 * skip + end_macs(config) + timestep_mlp + final_conv


def self_attention_macs(tokens: int, width: int) -> int:
    """Return the multiply-accumulates of self-attention: four projections, attention scores and weighted sum."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def end_macs(config: DiTConfig | UViTConfig) -> int:
    """Return the multiply-accumulates of the linear maps from patches to tokens and back."""
    patch = config.patch_size**2 * (config.in_channels + config.out_channels)
    return config.num_tokens * config.hidden_size * patch
