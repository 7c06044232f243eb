"""The diffusion transformer. Source: Peebles & Xie 2022 (https://arxiv.org/abs/2212.09748)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit.conditions import LabelsOrConditions
from dit.config import MODEL_NAMES, DiTConfig, UViTConfig, named_config
from dit.layers.attention import rotation_table
from dit.layers.blocks import AdaLNBlock, AdaLNZeroBlock, CrossAttentionBlock, FinalLayer, InContextBlock
from dit.layers.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, position_embedding, unpatchify
from dit.layers.head import HeadFinalLayer, WideHead
from dit.layers.inputs import check_inputs
from dit.layers.recomputation import run_blocks
from dit.uvit import UViT

__all__ = ["MODEL_NAMES", "DiT", "DiTConfig", "build_model", "build_uninitialized", "create_model", "meta_state"]

BLOCKS = {
    "adaln_zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


def create_model(name: str, **overrides: Any) -> "DiT | UViT":
    """Build and initialise one of MODEL_NAMES or UVIT_NAMES; overrides are fields of its configuration.

    Raises InvalidInput for an unknown name, an unknown field or a value out of range.
    """
    return build_model(named_config(name, **overrides))


def build_model(config: DiTConfig | UViTConfig) -> "DiT | UViT":
    """Build and initialise the network that a configuration describes."""
    return UViT(config) if isinstance(config, UViTConfig) else DiT(config)


def build_uninitialized(config: DiTConfig | UViTConfig) -> "DiT | UViT":
    """Build the network for weights that are loaded into it: buffers are right, but no parameter is drawn.

    Drawing takes a core about a second for 100 million parameters. On the meta device there would be no buffers, and
    the last bits of those of another device differ.
    """
    with _ZerosForDraws():
        return build_model(config)


class _ZerosForDraws(TorchFunctionMode):
    """Fills tensors with zeros where random numbers are to be drawn into them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            # Not left as it is: nn.init.trunc_normal_ draws until all values are within bounds.
            return tensor.detach().zero_()
        return func(*args, **kwargs)


_DRAWS = {nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_}


def meta_state(config: DiTConfig | UViTConfig) -> dict[str, Tensor]:
    """Return the state dict of a model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return build_model(config).state_dict()


class DiT(nn.Module):
    """Diffusion transformer on latents, conditioned on timestep and class.

    Parameters of the adaLN-Zero model have the names of the official checkpoints. The model does not drop labels:
    training batches contain the null class where a label is dropped, as a function of (seed, step, position), so that
    labels do not depend on the number of workers.

    With head_width, a wide head (`dit.layers.head`) stands between the blocks and the final layer.
    """

    rotation: Tensor | None
    """Cosines and sines of the token positions; None with sine-cosine position embeddings."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.t_embedder = TimestepEmbedder(width, config.timestep_frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_labels, width) if config.num_classes else None
        rope = config.position == "rope"
        # A parameter although it is never trained, because official checkpoints and parameter counts include it.
        table = position_embedding(width, *config.grid_size).float()
        self.pos_embed = None if rope else nn.Parameter(table[None], requires_grad=False)
        unrotated = config.num_conditions if config.conditioning == "in_context" else 0
        rotation = rotation_table(config.head_size, *config.grid_size, unrotated).float() if rope else None
        self.register_buffer("rotation", rotation, persistent=False)
        block = BLOCKS[config.conditioning]
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.head = None if config.head is None else WideHead(config.head, width)
        self.final_layer = FinalLayer(config) if config.head is None else HeadFinalLayer(config.head)
        self.initialize_weights()

    @property
    def null_class(self) -> int | None:
        """Label that stands for "no label", or None if the model has none."""
        return self.config.null_class

    def initialize_weights(self) -> None:
        """Initialise linear layers Xavier-uniform, embeddings normal, and modulations and the final layer zero.

        The general rule comes first; exceptions overwrite it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.x_embedder, *([] if self.head is None else [self.head.x_embedder])):
            patch = embedder.proj
            nn.init.xavier_uniform_(patch.weight.view(patch.out_channels, -1))
            assert patch.bias is not None, "the patch projection has a bias"
            nn.init.zeros_(patch.bias)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        modules = dict(self.named_modules())
        modulations = [modules[name] for name in modules if name.endswith(("adaLN_modulation", "token_modulation"))]
        for layer in [self.final_layer.linear, *(m[1] for m in modulations)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: LabelsOrConditions = None) -> Tensor:
        """Predict noise, velocity or clean latents, and the variance's channels if learned, from noised latents.

        x: (N, C, H, W) noised latents. t: (N,) timesteps: integers 0..999 of the full process for diffusion, times
        in [0, 1] for flow. y: (N,) int64 labels, or Conditions that have them alone, null_class for "no label"; an
        unconditional model ignores labels.
        Returns (N, 2C, H, W) if learn_sigma, else (N, C, H, W).
        Raises InvalidInput if shapes, or labels on the CPU, do not fit the model, or for conditions beside labels.
        """
        labels = check_inputs(self.config, x, t, y)
        if self.config.flow_time == "noise":
            t = 1 - t
        # Under autocast patches are bfloat16; the residual stream keeps the precision of the weights.
        tokens = self.x_embedder(x).to(self.x_embedder.proj.weight.dtype)  # (N, T, D)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        conditions = [self.t_embedder(t)]  # each (N, D)
        if self.y_embedder is not None:
            conditions.append(self.y_embedder(labels))
        if self.config.conditioning in ("adaln_zero", "adaln"):
            c = torch.stack(conditions).sum(0)  # (N, D)
        else:
            c = torch.stack(conditions, dim=1)  # (N, S, D)
        if self.config.conditioning == "in_context":
            tokens = torch.cat([c, tokens], dim=1)  # (N, S + T, D)
        tokens = run_blocks(self.blocks, tokens, c, self.rotation, recompute=self.config.gradient_checkpointing)
        tokens = tokens[:, -self.config.num_tokens :]
        if self.head is not None:
            tokens, c = self.head(x, tokens, c)  # each (N, T, head_width)
        patches = self.final_layer(tokens, c)  # (N, T, patch * patch * out_channels)
        out = unpatchify(patches, self.config.patch_size, self.config.grid_size)
        return -out if self.config.flow_time == "noise" else out
