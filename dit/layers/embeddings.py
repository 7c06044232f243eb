"""Embeddings of patches, positions, timesteps and labels; and patches back to latents.

Shapes: N images, T tokens of width D.
"""

import math

import torch
from torch import Tensor, nn

from dit.config import TIMESTEP_FREQUENCIES


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0, frequency_shift: int = 0) -> Tensor:
    """Sinusoidal embedding of timesteps (N,) -> (N, dim) float32: the cosine half first, then the sine half.

    Diffusion models pass integers 0..999 of the full process, flow models times in [0, 1].
    Frequency i of h = dim / 2 is max_period^(-i / (h - frequency_shift)): DDPM's code and diffusers shift by 1.
    Source: Vaswani et al. 2017, section 3.5 (https://arxiv.org/abs/1706.03762), halves swapped as in DiT.
    """
    half = dim // 2
    # In this order, to the bit as others compute it: an angle is up to 999 times its frequency's rounding error.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponents / (half - frequency_shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a grid in row-major order: (rows * columns, dim) float64.

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
    """Latents (N, C, H, W) -> tokens (N, T, D): one linear map shared by all patches."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: every sum and every norm that follows would keep the order of the axes, and copy.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Lay patches (N, rows * columns, patch * patch * C) back: (N, C, rows * patch, columns * patch).

    Inside a token the channel varies fastest: (patch row, patch column, channel).
    """
    rows, columns = grid_size
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, columns))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) -> vectors (N, D): sinusoidal embedding, then linear, SiLU, linear."""

    def __init__(self, hidden_size: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_embedding(t, TIMESTEP_FREQUENCIES, frequency_shift=self.frequency_shift)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) -> vectors (N, D)."""

    def __init__(self, num_labels: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)
