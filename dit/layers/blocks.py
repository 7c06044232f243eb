"""The blocks of a diffusion transformer.

Shapes: N images, T tokens of width D, S conditioning tokens.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dit.config import NORM_EPS, DiTConfig
from dit.layers.attention import Attention, CrossAttention, RMSNorm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens x (N, T, D) by per-image vectors (N, D), as x * (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Mlp(nn.Module):
    """Feed-forward layer on the last dimension: linear layer, GELU, linear layer."""

    def __init__(self, hidden_size: int, mlp_size: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x (..., hidden_size)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: fc1 computes gates and values, fc2 maps SiLU(gates) * values back.

    Source: Shazeer 2020, eq. 6 (https://arxiv.org/abs/2002.05202), with biases as in the other layers of DiT.
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x (..., hidden_size)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def self_attention(config: DiTConfig) -> Attention:
    """Build the multi-head self-attention of a block."""
    return Attention(config.hidden_size, config.num_heads, qk_norm=config.qk_norm)


def feed_forward(config: DiTConfig) -> nn.Module:
    """Build the feed-forward layer of a block, which processes every token separately."""
    return (SwiGLU if config.mlp == "swiglu" else Mlp)(config.hidden_size, config.mlp_size)


def norm_layer(config: DiTConfig, affine: bool, eps: float = NORM_EPS) -> nn.Module:
    """Build the norm before a residual branch.

    affine: whether it has weights of its own; not where the conditioning supplies shift and scale. eps: of a layer
    norm; an RMS norm always uses NORM_EPS.
    """
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, affine)
    return nn.LayerNorm(config.hidden_size, eps=eps, elementwise_affine=affine)


def modulation(hidden_size: int, num_vectors: int) -> nn.Sequential:
    """Build the map from a condition (..., D) to shifts, scales and gates, concatenated: (..., num_vectors * D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_vectors * hidden_size))


class AdaLNZeroBlock(nn.Module):
    """Transformer block in which the condition (N, D) shifts and scales the norms and gates the branches.

    Gates are initialised to zero, so that the block starts as the identity. Source: Peebles & Xie 2022, section 3.2.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(config, affine=False)
        self.attn = self_attention(config)
        self.norm2 = norm_layer(config, affine=False, eps=config.mlp_norm_eps)
        self.mlp = feed_forward(config)
        self.adaLN_modulation = modulation(config.hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return tokens (N, T, D); rotation: rotary positions (2, T, d / 2), or None."""
        vectors = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotation)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNBlock(nn.Module):
    """Transformer block in which the condition (N, D) shifts and scales the norms."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(config, affine=False)
        self.attn = self_attention(config)
        self.norm2 = norm_layer(config, affine=False)
        self.mlp = feed_forward(config)
        self.adaLN_modulation = modulation(config.hidden_size, 4)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return tokens (N, T, D); rotation: rotary positions (2, T, d / 2), or None."""
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotation)
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class CrossAttentionBlock(nn.Module):
    """Transformer block with cross-attention to the conditioning tokens (N, S, D) after self-attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(config, affine=True)
        self.attn = self_attention(config)
        self.norm_cross = norm_layer(config, affine=True)
        self.cross_attn = CrossAttention(config.hidden_size, config.num_heads, qk_norm=config.qk_norm)
        self.norm2 = norm_layer(config, affine=True)
        self.mlp = feed_forward(config)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return tokens (N, T, D); rotation: rotary positions (2, T, d / 2), or None."""
        x = x + self.attn(self.norm1(x), rotation)
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class InContextBlock(nn.Module):
    """Standard transformer block on one sequence of conditioning and image tokens (N, S + T, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(config, affine=True)
        self.attn = self_attention(config)
        self.norm2 = norm_layer(config, affine=True)
        self.mlp = feed_forward(config)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Return tokens (N, S + T, D); c is ignored, because the conditioning tokens are among x already."""
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Map of tokens (N, T, D) to patches (N, T, patch * patch * C), after a norm that c (N, D) may modulate."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        modulated = config.conditioning in ("adaln_zero", "adaln")
        self.norm_final = norm_layer(config, affine=not modulated)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = modulation(config.hidden_size, 2) if modulated else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return patches (N, T, patch * patch * C); c is ignored if it does not modulate the norm."""
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            x = modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1))
        return self.linear(x)
