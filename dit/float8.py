"""Training with matrix products in float8: which layers compute so, and what they need. Imports torch on use.

Source of the formats: Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433): values in e4m3 (3 bits of mantissa),
gradients in e5m2 (2 bits). Each tensor has a scale of its own that maps its largest magnitude to the format's, found
anew for every product. That is torchao's fastest recipe; scales by rows are finer, and their products slower.

Only weights, activations and gradients on their way into a product are rounded. Weights stay float32 parameters under
their own names, so that optimizers, averages and checkpoints do not know of it.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dit.config import DiTConfig, UViTConfig
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dit.model import DiT
    from dit.uvit import UViT

ALIGNMENT = 16
"""Widths of a float8 product must be multiples of this number."""
FIRST_CAPABILITY = (8, 9)
"""The lowest compute capability of NVIDIA GPUs with float8 units: Ada; Hopper has 9.0."""

NOT_PER_TOKEN = ("adaLN_modulation", "cross_attn.kv")
"""Parts of a block that compute on conditions, one or two vectors for each image, and stay in bfloat16.

A DiT's modulation is a third of its block's weights, but 6 of 6 + 12 T parts of the FLOPs of its linear layers: 0.2%
with T = 256 tokens. Its product is bound by reading the weights, which float8 would have to read twice, for their scale
first. And it sets the scale of every norm of its image, where an error moves all tokens alike.
"""


def require_float8_shapes(model: DiTConfig | UViTConfig) -> None:
    """Raise InvalidInput if a model's widths, those of its wide head included, do not fit float8 products."""
    widths = {"hidden_size": model.hidden_size, "mlp_size": model.mlp_size}
    head = model.head if isinstance(model, DiTConfig) else None
    if head is not None:
        widths |= {"head_width": head.hidden_size, "mlp_size of the head": head.mlp_size}
    for name, width in widths.items():
        if width % ALIGNMENT:
            raise InvalidInput(
                f"train.matmul: found 'float8' with a model of {name} = {width}",
                f"a multiple of {ALIGNMENT}, which float8 products of NVIDIA GPUs need",
                "change the model's widths, or remove train.matmul",
            )


def require_float8(device: "torch.device") -> None:
    """Raise InvalidInput if this process cannot train with float8 products on a device."""
    if reason := missing_float8(device):
        raise InvalidInput(
            f"train.matmul: found 'float8', and {reason}",
            "an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper)",
            "train on such GPUs, set by train.accelerator_type, or remove train.matmul",
        )
    require_torchao()


def missing_float8(device: "torch.device") -> str | None:
    """Return why a device has no float8 products, in words; None if it has them."""
    import torch

    if device.type != "cuda":
        return "this worker computes on the CPU"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"{name} is not an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"this {name} has compute capability {major}.{minor}" if (major, minor) < FIRST_CAPABILITY else None


def require_torchao() -> None:
    """Raise InvalidInput if torchao, which has the layers, is not installed for this interpreter."""
    if find_spec("torchao") is None:
        raise InvalidInput(
            "train.matmul: found 'float8' without the package torchao",
            "torchao on every node that trains",
            "run `pip install 'raydit[fp8]'` there, or remove train.matmul",
        )


def use_float8(network: "DiT | UViT", *, emulate: bool = False) -> None:
    """Replace the linear layers of a network's blocks by float8 ones, in place.

    network: a DiT or U-ViT that is not yet compiled, nor wrapped for DDP or sharded for FSDP2. The layers are replaced
    by others with the same parameters. emulate: round as float8 does, and multiply in float32; for tests without a GPU.
    """
    from torch import nn
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = set(float8_layers(network).values())
    # Products for gradients of weights run over all tokens of the batch, whose number is not always a multiple.
    config = Float8LinearConfig(pad_inner_dim=block_tokens(network.config) % ALIGNMENT != 0, emulate=emulate)

    def is_chosen(layer: nn.Module, name: str) -> bool:
        return layer in chosen

    convert_to_float8_training(network, module_filter_fn=is_chosen, config=config)


def float8_layers(network: "nn.Module") -> "dict[str, nn.Linear]":
    """Return the layers that compute in float8, by name: the linear layers of blocks that every token passes.

    These are the products of attention and MLP, of a U-ViT's skips, and of the modulation of each token in a wide head:
    99.8% of the FLOPs of all linear layers of DiT-XL/2. Embeddings and the last layer stay in bfloat16: they are
    narrow, and errors in them are errors of the input and the output.
    """
    from torch import nn

    from dit.compilation import repeated_blocks

    blocks = set(repeated_blocks(network))
    return {
        f"{name}.{part}": layer
        for name, block in network.named_modules()
        if block in blocks
        for part, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and not part.startswith(NOT_PER_TOKEN)
    }


def block_tokens(model: DiTConfig | UViTConfig) -> int:
    """Return the number of tokens of an image that pass the blocks, conditioning tokens included."""
    in_sequence = isinstance(model, UViTConfig) or model.conditioning == "in_context"
    return model.num_tokens + (model.num_conditions if in_sequence else 0)
