"""Embeddings of patches, positions, timesteps and labels; and patches back to latents.

Shapes: N images, T tokens of width D.
"""

import math

import torch
from torch import Tensor, nn

from dit.config import TIMESTEP_FREQUENCIES


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0, frequency_shift: int = 0) -> Tensor:
    """Return the sinusoidal embedding of timesteps (N,): (N, dim) float32, cosines first, then sines.

    Diffusion models pass integers 0..999 of the full process, flow models times in [0, 1].
    Frequency i of h = dim / 2 is max_period^(-i / (h - frequency_shift)); DDPM's code and diffusers use a shift of 1.
    Source: Vaswani et al. 2017, section 3.5 (https://arxiv.org/abs/1706.03762), halves swapped as in DiT.
    """
    half = dim // 2
    # The order of operations is that of DiT's code: timesteps up to 999 multiply the rounding errors of frequencies.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponents / (half - frequency_shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(dim: int, rows: int, columns: int) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding of a grid in row-major order: (rows * columns, dim) float64.

    The first half encodes the column (width coordinate), the second the row; each is sine, then cosine.
    Source: Chen et al. 2021, MoCo v3 (https://arxiv.org/abs/2104.02057).
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


class PatchEmbed(nn.Module):
    """Linear map of latents (N, C, H, W) to tokens (N, T, D), the same for all patches."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (N, T, D) of latents x (N, C, H, W)."""
        # Contiguous, because every sum and norm that follows would keep the transposed layout and copy.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Arrange patches (N, rows * columns, patch * patch * C) into images (N, C, rows * patch, columns * patch).

    Within a token the channel varies fastest: (patch row, patch column, channel).
    """
    rows, columns = grid_size
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, columns))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """Embedding of timesteps (N,) as vectors (N, D): sinusoidal embedding, linear layer, SiLU, linear layer."""

    def __init__(self, hidden_size: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Return the embeddings (N, D) of timesteps t (N,)."""
        waves = timestep_embedding(t, TIMESTEP_FREQUENCIES, frequency_shift=self.frequency_shift)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Table of vectors (num_labels, D) that embeds labels (N,)."""

    def __init__(self, num_labels: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Return the embeddings (N, D) of labels y (N,)."""
        return self.embedding_table(y)
