"""A wide, shallow head after the blocks of a diffusion transformer, for latents of many channels.

From the source, DiT^DH of Zheng et al. 2025 (https://arxiv.org/abs/2510.11690, section 5), after the decoder of DDT
(https://arxiv.org/abs/2504.05741): the deep and narrow trunk no longer predicts. Its output conditions each token of a
second transformer, which embeds the noised latents anew; the source has two blocks of width 2048, so that a token is
wider than the 768 channels of the latents, at 2 * 18 * 2048^2 more parameters. Attention heads are 128 wide.

Ours: the condition of a token is the trunk's token plus the sum of timestep and label embeddings, as the trunk's
own blocks have it (the source adds the timestep alone, as its trunk knows the label); positions are the model's, in
the head as in the trunk, sine-cosine or rotary, without parameters; and the official code's initialisation of
adaLN-Zero holds for the head, so that a model with one predicts zero at the start, as a model without one does.

Shapes: N images, T tokens, of width D in the trunk and W in the head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dit.config import DiTConfig
from dit.layers.attention import rotation_table
from dit.layers.blocks import feed_forward, modulation, norm_layer, self_attention
from dit.layers.embeddings import PatchEmbed, position_embedding
from dit.layers.recomputation import run_blocks


class HeadBlock(nn.Module):
    """Transformer block as `AdaLNZeroBlock`, but for a condition of each token (N, T, W) instead of each image."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(config, affine=False)
        self.attn = self_attention(config)
        self.norm2 = norm_layer(config, affine=False, eps=config.mlp_norm_eps)
        self.mlp = feed_forward(config)
        self.token_modulation = modulation(config.hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return tokens (N, T, W); rotation: rotary positions (2, T, d / 2), or None."""
        vectors = self.token_modulation(c).chunk(6, dim=-1)  # each (N, T, W)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa, rotation)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class HeadFinalLayer(nn.Module):
    """Map of tokens (N, T, W) to patches (N, T, patch * patch * C), after a norm that c (N, T, W) modulates."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = norm_layer(config, affine=False)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.token_modulation = modulation(config.hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return patches (N, T, patch * patch * C)."""
        shift, scale = self.token_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class WideHead(nn.Module):
    """Transformer on the patches of the noised latents, each of which a token of the trunk conditions.

    The model's final layer, a `HeadFinalLayer`, follows it.
    """

    positions: Tensor | None
    """Sine-cosine embeddings of the positions (T, W); None with rotary positions."""
    rotation: Tensor | None
    """Cosines and sines of the positions (2, T, d / 2); None with sine-cosine embeddings."""

    def __init__(self, config: DiTConfig, trunk_width: int) -> None:
        """Build the head that `DiTConfig.head` describes, after a trunk whose tokens have a width."""
        super().__init__()
        width, rope = config.hidden_size, config.position == "rope"
        self.gradient_checkpointing = config.gradient_checkpointing
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.projection = nn.Linear(trunk_width, width)
        self.blocks = nn.ModuleList(HeadBlock(config) for _ in range(config.depth))
        table = None if rope else position_embedding(width, *config.grid_size).float()
        rotation = rotation_table(config.head_size, *config.grid_size).float() if rope else None
        self.register_buffer("positions", table, persistent=False)
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: Tensor, trunk: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (N, T, W), and the condition of each (N, T, W).

        x: (N, C, H, W) noised latents. trunk: (N, T, D) output of the trunk's blocks. c: (N, D) sum of the timestep's
        and label's embeddings.
        """
        condition = self.projection(F.silu(trunk + c[:, None]))  # (N, T, W)
        # As in the trunk, the residual stream keeps the precision of the weights under autocast.
        tokens = self.x_embedder(x).to(self.x_embedder.proj.weight.dtype)
        if self.positions is not None:
            tokens = tokens + self.positions
        tokens = run_blocks(self.blocks, tokens, condition, self.rotation, recompute=self.gradient_checkpointing)
        return tokens, condition
