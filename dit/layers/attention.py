"""Attention of both architectures, and rotary positions.

Shapes: N images, T tokens of width D, S conditioning tokens, heads of width d.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.config import NORM_EPS


def rotation_table(head_size: int, rows: int, columns: int, num_unrotated: int = 0) -> Tensor:
    """Return the cosines and sines of axial rotary positions: (2, num_unrotated + rows * columns, head_size / 2).

    The result is float64, and grids are in row-major order. The first half of the frequencies rotates with the
    column, the second with the row, as in `position_embedding`. The leading num_unrotated tokens have no position in
    the grid and are not rotated.
    Source: Su et al. 2021, section 3.2.2 (https://arxiv.org/abs/2104.09864), one half for each axis.
    """
    quarter = head_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = torch.cat([coordinate.reshape(-1, 1) * frequencies for coordinate in (column, row)], dim=1)
    angles = torch.cat([angles.new_zeros(num_unrotated, 2 * quarter), angles])
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries or keys (N, heads, T, d) by `rotation` (2, T, d / 2); entries i and i + d / 2 form a pair."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    # The table stays float32 under autocast, and so do its products with bfloat16.
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalisation of the last dimension by its root mean square, followed by weights if affine.

    Source: Zhang & Sennrich 2019, eq. 4 (https://arxiv.org/abs/1910.07467).
    """

    def __init__(self, size: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., size) in float32 and return it in its own dtype."""
        # torch's own module would promote bfloat16 inputs to the dtype of float32 weights.
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), x.shape[-1:], weight, NORM_EPS).to(x.dtype)


def head_norm(head_size: int, qk_norm: bool) -> nn.Module:
    """Build the norm of queries or keys: an RMS norm whose weights all heads share, or the identity."""
    return RMSNorm(head_size) if qk_norm else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention on tokens (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int, *, qkv_bias: bool = True, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.q_norm = head_norm(hidden_size // num_heads, qk_norm)
        self.k_norm = head_norm(hidden_size // num_heads, qk_norm)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return attended tokens (N, T, D).

        rotation: (2, T, d / 2) cosines and sines of rotary positions, or None without them.
        """
        # (N, T, 3D) -> (3, N, heads, T, d)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (N, T, D) to conditioning tokens (N, S, D)."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = head_norm(hidden_size // num_heads, qk_norm)
        self.k_norm = head_norm(hidden_size // num_heads, qk_norm)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return tokens (N, T, D), each a mixture of the conditioning tokens c (N, S, D)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(c).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))
