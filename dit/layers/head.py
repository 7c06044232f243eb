"""A wide, shallow head after the blocks of a diffusion transformer, for latents of many channels.

Source: DiT^DH of Zheng et al. 2025 (https://arxiv.org/abs/2510.11690), after the decoder of DDT (Wang et al. 2025,
https://arxiv.org/abs/2504.05741). The deep, narrow trunk no longer predicts. Its output conditions each token of a
second transformer, which embeds the noised latents anew, through SiLU and a linear layer. The source has two blocks of
width 2048, so that a token is wider than the 768 channels of the latents, with attention heads of width 128;
modulations are zero at the start, as in adaLN-Zero, so that the model predicts zero then.

Where this code differs: the condition of a token is the trunk's token plus the embeddings of timestep and label, as in
the trunk's blocks; the source adds the timestep alone, because its trunk knows the label. Norms, feed-forward layers
and positions are those that the configuration chooses for the trunk, and neither kind of positions has parameters here.

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
