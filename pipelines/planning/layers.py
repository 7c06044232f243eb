"""The layers of a network by name, in the order in which they compute, with their matrix products; needs no torch."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from dit.config import TIMESTEP_FREQUENCIES, DiTConfig, UViTConfig


class Layer(NamedTuple):
    """A layer of a network."""

    name: str
    """Name of the module in the network, or of the parameter if it is a learned table of positions."""
    kind: Literal["linear", "convolution", "attention", "other"]
    """An "attention" is its two products alone, which have no weights; "other" layers have weights and no products."""
    inputs: int = 0
    """Numbers that each output of a linear layer or a convolution depends on."""
    outputs: int = 0
    """Numbers that a linear layer or a convolution computes in each row."""
    rows: int = 0
    """Vectors that a linear layer maps for each image; positions at which a convolution computes."""
    products: int = 0
    """Multiply-accumulates of an attention for each image."""
    reads: Literal["data", "condition", "tokens"] = "tokens"
    """What the layer's input depends on: the data alone (latents, timesteps, labels), their embedded condition as well,
    or the tokens, and through them all layers before."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass on one image."""
        return self.products + self.rows * self.inputs * self.outputs


class LayerGroup(NamedTuple):
    """Layers that compute one after the other: a block, or what comes before, between or after blocks."""

    layers: tuple[Layer, ...]
    kind: Literal["block", "head block", "other"] = "other"


def layer_groups(model: DiTConfig | UViTConfig) -> list[LayerGroup]:
    """Return all layers of a network that have weights or products, in the order in which they compute."""
    return [*(_uvit_groups(model) if isinstance(model, UViTConfig) else _dit_groups(model))]


def network_layers(model: DiTConfig | UViTConfig) -> list[Layer]:
    """Return the layers of `layer_groups` in one list."""
    return [layer for group in layer_groups(model) for layer in group.layers]


def _dit_groups(model: DiTConfig) -> Iterator[LayerGroup]:
    width, tokens, patch = model.hidden_size, model.num_tokens, model.patch_size**2
    yield LayerGroup(
        (
            Layer("x_embedder.proj", "convolution", patch * model.in_channels, width, tokens, reads="data"),
            Layer("t_embedder.mlp.0", "linear", TIMESTEP_FREQUENCIES, width, 1, reads="data"),
            Layer("t_embedder.mlp.2", "linear", width, width, 1, reads="condition"),
            Layer("y_embedder.embedding_table", "other", reads="data"),
        )
    )
    rows = tokens + (model.num_conditions if model.conditioning == "in_context" else 0)
    vectors = {"adaln_zero": 6, "adaln": 4}.get(model.conditioning, 0)
    for index in range(model.depth):
        name = f"blocks.{index}"
        modulation = Layer(f"{name}.adaLN_modulation.1", "linear", width, vectors * width, 1, reads="condition")
        cross = _cross_attention(name, model) if model.conditioning == "cross_attention" else ()
        layers = (*_attention(name, model, rows), *cross, *_feed_forward(name, model, rows))
        yield LayerGroup((*((modulation,) if vectors else ()), *layers), "block")
    head, final = model.head or model, Layer("final_layer.norm_final", "other")
    if model.head is not None:
        yield from _head_groups(model.head, width)
        modulation = Layer("final_layer.token_modulation.1", "linear", head.hidden_size, 2 * head.hidden_size, tokens)
        modulated: tuple[Layer, ...] = (modulation,)
    else:
        modulation = Layer("final_layer.adaLN_modulation.1", "linear", width, 2 * width, 1, reads="condition")
        modulated = (modulation,) if vectors else ()
    linear = Layer("final_layer.linear", "linear", head.hidden_size, patch * model.out_channels, tokens)
    yield LayerGroup((final, *modulated, linear))


def _head_groups(head: DiTConfig, trunk_width: int) -> Iterator[LayerGroup]:
    """Yield what a wide head computes before its final layer."""
    width, tokens, patch = head.hidden_size, head.num_tokens, head.patch_size**2 * head.in_channels
    projection = Layer("head.projection", "linear", trunk_width, width, tokens)
    yield LayerGroup((projection, Layer("head.x_embedder.proj", "convolution", patch, width, tokens, reads="data")))
    for index in range(head.depth):
        name = f"head.blocks.{index}"
        modulation = Layer(f"{name}.token_modulation.1", "linear", width, 6 * width, tokens)
        yield LayerGroup(
            (modulation, *_attention(name, head, tokens), *_feed_forward(name, head, tokens)), "head block"
        )


def _uvit_groups(model: UViTConfig) -> Iterator[LayerGroup]:
    width, tokens, patch = model.hidden_size, model.num_tokens, model.patch_size**2 * model.in_channels
    rows = tokens + model.num_conditions
    yield LayerGroup(
        (
            Layer("patch_embed.proj", "convolution", patch, width, tokens, reads="data"),
            *(
                (
                    Layer("time_embed.0", "linear", width, 4 * width, 1, reads="data"),
                    Layer("time_embed.2", "linear", 4 * width, width, 1, reads="condition"),
                )
                if model.mlp_time_embed
                else ()
            ),
            Layer("label_emb", "other", reads="data"),
            Layer("pos_embed", "other", reads="data"),
        )
    )
    half = model.depth // 2
    names = [f"in_blocks.{index}" for index in range(half)] + ["mid_block"]
    for name in names + [f"out_blocks.{index}" for index in range(half)]:
        has_skip = name.startswith("out")
        merged = (Layer(f"{name}.skip_linear", "linear", 2 * width, width, rows),) if has_skip else ()
        yield LayerGroup((*merged, *_attention(name, model, rows), *_feed_forward(name, model, rows)), "block")
    channels, (height, columns) = model.in_channels, model.latent_size
    convolution = Layer("final_layer", "convolution", 9 * channels, channels, height * columns)
    ends = Layer("norm", "other"), Layer("decoder_pred", "linear", width, patch, tokens)
    yield LayerGroup((*ends, *((convolution,) if model.final_conv else ())))


def _attention(block: str, model: DiTConfig | UViTConfig, rows: int) -> tuple[Layer, ...]:
    width = model.hidden_size
    return (
        Layer(f"{block}.norm1", "other"),
        Layer(f"{block}.attn.qkv", "linear", width, 3 * width, rows),
        *(Layer(f"{block}.attn.{name}", "other") for name in ("q_norm", "k_norm")),
        Layer(f"{block}.attn", "attention", products=2 * rows**2 * width),
        Layer(f"{block}.attn.proj", "linear", width, width, rows),
    )


def _cross_attention(block: str, model: DiTConfig) -> tuple[Layer, ...]:
    width, tokens, conditions = model.hidden_size, model.num_tokens, model.num_conditions
    return (
        Layer(f"{block}.norm_cross", "other"),
        Layer(f"{block}.cross_attn.q", "linear", width, width, tokens),
        Layer(f"{block}.cross_attn.kv", "linear", width, 2 * width, conditions, reads="condition"),
        *(Layer(f"{block}.cross_attn.{name}", "other") for name in ("q_norm", "k_norm")),
        Layer(f"{block}.cross_attn", "attention", products=2 * tokens * conditions * width),
        Layer(f"{block}.cross_attn.proj", "linear", width, width, tokens),
    )


def _feed_forward(block: str, model: DiTConfig | UViTConfig, rows: int) -> tuple[Layer, ...]:
    width, hidden = model.hidden_size, model.mlp_size
    fused = 2 * hidden if isinstance(model, DiTConfig) and model.mlp == "swiglu" else hidden
    return (
        Layer(f"{block}.norm2", "other"),
        Layer(f"{block}.mlp.fc1", "linear", width, fused, rows),
        Layer(f"{block}.mlp.fc2", "linear", hidden, width, rows),
    )
