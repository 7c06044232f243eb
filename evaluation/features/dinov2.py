"""DINOv2's vision transformer (Oquab et al. 2023, arXiv 2304.07193), which loads the published weights.

torch-fidelity downloads the network's code from a repository whenever it is built. Here the code is our own, so that
weights on disk need no network connection and no downloaded code is run.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 14

_GRID_OFFSET = 0.1
"""Patches that are added to the side of the grid before it is divided by the trained side. The weights' authors do so
lest a rounding error lose a row; it shifts every interpolated position a little."""


@dataclass(frozen=True, kw_only=True)
class DinoV2Config:
    """Sizes of the network. The hidden layer of its MLPs is 4 dim wide."""

    dim: int
    """Width of the tokens, and number of features of an image."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads of a block."""
    grid: int = 37
    """Patches along the side of the images that the position embeddings were trained on (518 px)."""


class DinoV2(nn.Module):
    """Vision transformer from normalised images (N, 3, H, W) to features (N, dim) of the class token.

    H and W are multiples of PATCH_PX.
    """

    def __init__(self, config: DinoV2Config):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, config.dim))  # unused here, but part of the published weights
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.dim))
        self.patch_embed = PatchEmbedding(config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images)  # (N, dim, h, w)
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        x = x + self._positions(*patches.shape[2:])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        """Interpolate the trained position embeddings to the image's grid: (1, 1 + height * width, dim)."""
        side = self.config.grid
        if height == width == side:
            return self.pos_embed
        trained = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = ((height + _GRID_OFFSET) / side, (width + _GRID_OFFSET) / side)
        grid = F.interpolate(trained, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbedding(nn.Module):
    """Convolution from patches to tokens, a module of its own to match the names of the published weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_PX, stride=PATCH_PX)


class Block(nn.Module):
    """Transformer block: x + scale * attention(norm(x)), then x + scale * mlp(norm(x))."""

    def __init__(self, config: DinoV2Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config.dim)
        self.ls2 = LayerScale(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: DinoV2Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, dim / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear layer, exact GELU, linear layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each feature."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
