"""U-ViT: a transformer with long skip connections whose tokens are the timestep, the label and the patches.

Source: Bao et al. 2022 (https://arxiv.org/abs/2209.12152).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit.conditions import LabelsOrConditions
from dit.config import UViTConfig
from dit.layers.attention import Attention
from dit.layers.blocks import Mlp
from dit.layers.embeddings import PatchEmbed, timestep_embedding, unpatchify
from dit.layers.inputs import check_inputs

__all__ = ["UViT", "UViTConfig"]


class Block(nn.Module):
    """Transformer block on tokens (N, T, D); with skip, it first merges them with those of a shallow block."""

    def __init__(self, config: UViTConfig, skip: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        # As in the official code, norms have weights and torch's default epsilon, 1e-5, unlike DiT's.
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.num_heads, qkv_bias=config.qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.mlp_size, approximate="none")
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, *shallow: Tensor) -> Tensor:
        """Return tokens (N, T, D); shallow: the tokens (N, T, D) of a shallow block with skip, nothing without."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, *shallow], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """U-ViT on latents, conditioned on timestep and class.

    Parameters have the names of the official checkpoints. Official discrete-time models were trained with timesteps
    1..1000, where DiT counts 0..999: for those, first_timestep is 1. As in `dit.model.DiT`, training batches contain
    the null class where a label is dropped.
    """

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, config.in_channels
        self.patch_embed = PatchEmbed(channels, width, config.patch_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if config.mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(config.num_labels, width) if config.num_classes else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_conditions + config.num_tokens, width))
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else nn.Identity()
        self.initialize_weights()

    @property
    def null_class(self) -> int | None:
        """Label that stands for "no label", or None if the model has none."""
        return self.config.null_class

    def initialize_weights(self) -> None:
        """Initialise linear layers and positions normal (standard deviation 0.02), biases zero, the rest by default."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: LabelsOrConditions = None) -> Tensor:
        """Predict noise, velocity or clean latents from noised latents.

        x: (N, C, H, W) noised latents. t: (N,) timesteps: integers of the full process for diffusion, times in
        [0, 1] for flow. y: (N,) int64 labels, or Conditions that have them alone, null_class for "no label"; an
        unconditional model ignores labels. Returns (N, C, H, W).
        Raises InvalidInput if shapes, or labels on the CPU, do not fit the model, or for conditions beside labels.
        """
        labels = check_inputs(self.config, x, t, y)
        time = timestep_embedding(t + self.config.first_timestep, self.config.hidden_size).to(self.pos_embed.dtype)
        sequence = [self.time_embed(time)[:, None], self.patch_embed(x)]
        if self.label_emb is not None:
            sequence.insert(0, self.label_emb(labels)[:, None])
        tokens = self._run_blocks(torch.cat(sequence, dim=1) + self.pos_embed)  # (N, S + T, D)
        patches = self.decoder_pred(self.norm(tokens[:, self.config.num_conditions :]))
        return self.final_layer(unpatchify(patches, self.config.patch_size, self.config.grid_size))

    def _run_blocks(self, tokens: Tensor) -> Tensor:
        """Pass tokens (N, S + T, D) through all blocks; skips join the first and the last block, and so on inwards."""
        shallow: list[Tensor] = []
        for block in self.in_blocks:
            tokens = self._run_block(block, tokens)
            shallow.append(tokens)
        tokens = self._run_block(self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = self._run_block(block, tokens, shallow.pop())
        return tokens

    def _run_block(self, block: nn.Module, *tokens: Tensor) -> Tensor:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, use_reentrant=False)
        return block(*tokens)
