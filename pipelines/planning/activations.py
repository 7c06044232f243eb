"""What a forward pass keeps for the backward pass, by what a training trains; without compilation.

A layer keeps its input for the gradient of its weights or of its factors, and everything else that a block keeps is for
gradients of inputs, so that nothing is kept before the first layer of which anything is trained. Under autocast linear
layers and attention keep its dtype; the residual stream and what norms keep stay float32. Vectors of which an image
has only one are not counted, nor are a norm's statistics.
"""

from dit.config import DiTConfig, UViTConfig
from pipelines.config.training import TrainConfig
from pipelines.planning.backward import GroupUse, LayerUse, group_uses
from pipelines.planning.layers import Layer
from pipelines.planning.networks import FLOAT32

NUMBER_BYTES = {"float32": FLOAT32, "tf32": FLOAT32, "bfloat16": 2}
"""Bytes of one number, by dtype."""


def activation_bytes(
    model: DiTConfig | UViTConfig, dtype: str = "float32", settings: TrainConfig | None = None
) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, per image, without compilation.

    dtype: the dtype of autocast. settings: what is trained; everything without them. Gradient checkpointing keeps the
    blocks' inputs and recomputes one block at a time.
    """
    tokens, size, head = model.num_tokens, NUMBER_BYTES[dtype], None
    if isinstance(model, UViTConfig) or model.conditioning == "in_context":
        tokens += model.num_conditions
    if isinstance(model, DiTConfig):
        head = model.head
    kept, blocks = 0.0, [0.0]
    for use in group_uses(model, settings or TrainConfig()):
        config = head if use.group.kind == "head block" and head is not None else model
        factors = sum(size * each.rank * each.layer.rows for each in use.layers)
        if use.group.kind == "other":
            kept += tokens * _end_bytes_per_token(use, model, size) + factors
        elif use.is_reached:
            has_input = model.gradient_checkpointing or _keeps_norm_input(_layer(use, "norm1"))
            kept += tokens * FLOAT32 * config.hidden_size * has_input
            blocks.append(tokens * _block_bytes_per_token(use, config, size) + factors)
    return kept + (max(blocks) if model.gradient_checkpointing else sum(blocks))


def cast_bytes(model: DiTConfig | UViTConfig, settings: TrainConfig) -> int:
    """Return the bytes of the bfloat16 copies of weights that autocast keeps until the backward pass is done.

    They are those of layers that are trained, or whose inputs have gradients.
    """
    layers = [each for use in group_uses(model, settings) for each in use.layers]
    kept = [each.layer for each in layers if each.trains_weight or each.has_input_gradient]
    return NUMBER_BYTES["bfloat16"] * sum(layer.inputs * layer.outputs for layer in kept)


NOTHING = LayerUse(Layer("", "other"), 0, trains_weight=False, trains=False, has_input_gradient=False)
"""Stands for a layer that a group does not have."""


def _layer(use: GroupUse, name: str) -> LayerUse:
    """Return the layer of a group whose name ends with `name`, or NOTHING."""
    return next((each for each in use.layers if f".{each.layer.name}".endswith(f".{name}")), NOTHING)


def _keeps_norm_input(norm: LayerUse) -> bool:
    return norm.has_input_gradient or norm.trains_weight


def _has_output_gradient(layer: LayerUse) -> bool:
    return layer.trains or layer.has_input_gradient


def _block_bytes_per_token(use: GroupUse, model: DiTConfig | UViTConfig, size: int) -> float:
    """Return what one block keeps per token besides its input. size: bytes of a number under autocast."""
    modulation = _layer(use, "token_modulation.1" if use.group.kind == "head block" else "adaLN_modulation.1")
    kept = FLOAT32 * _keeps_norm_input(_layer(use, "norm2")) + _attention_bytes(use, model, size)
    kept += size * (_layer(use, "attn.qkv").keeps_input + _layer(use, "mlp.fc1").keeps_input)
    if _has_output_gradient(modulation):  # the norms' outputs, which are scaled, and the gated outputs
        kept += 2 * FLOAT32 + (2 * size if modulation.layer.outputs == 6 * model.hidden_size else 0)
    if use.group.kind == "head block":  # the condition of each token after SiLU; shifts, scales and gates
        kept += size * modulation.keeps_input + 6 * size
    if isinstance(model, UViTConfig):
        kept += 2 * size * _layer(use, "skip_linear").keeps_input
    elif model.norm == "rms" and model.conditioning in ("cross_attention", "in_context"):
        norms = (_layer(use, name) for name in ("norm1", "norm_cross", "norm2"))
        kept += FLOAT32 * sum(norm.trains_weight for norm in norms)  # what the norms' weights multiply
    fc2, fused = _layer(use, "mlp.fc2"), 3 if isinstance(model, DiTConfig) and model.mlp == "swiglu" else 1
    hidden = size * model.mlp_size * (fused * fc2.has_input_gradient + fc2.keeps_input)
    return kept * model.hidden_size + hidden


def _attention_bytes(use: GroupUse, model: DiTConfig | UViTConfig, size: int) -> float:
    """Return what a block's attentions keep per token and number of the width."""
    kept = 0.0
    if _layer(use, "attn").has_input_gradient:  # queries, keys, values and the output, which the projection reads
        kept += 4 * size
        if isinstance(model, DiTConfig):
            kept += (5 * FLOAT32 if model.qk_norm else 0) + (3 * size if model.position == "rope" else 0)
    else:
        kept += size * _layer(use, "attn.proj").keeps_input
    cross = _layer(use, "cross_attn")
    kept += FLOAT32 * _keeps_norm_input(_layer(use, "norm_cross")) + size * _layer(use, "cross_attn.q").keeps_input
    return kept + 2 * size * cross.has_input_gradient  # queries and the output


def _end_bytes_per_token(use: GroupUse, model: DiTConfig | UViTConfig, size: int) -> float:
    """Return what is kept per token before a wide head and by the final layer; nothing before the blocks."""
    width, head = model.hidden_size, None if isinstance(model, UViTConfig) else model.head
    projection, norm = _layer(use, "head.projection"), _layer(use, "norm_final")
    if isinstance(model, UViTConfig):
        ends = FLOAT32 * _keeps_norm_input(_layer(use, "norm")) + size * _layer(use, "decoder_pred").keeps_input
        return ends * width
    if projection is not NOTHING:
        return (FLOAT32 * projection.has_input_gradient + size * projection.keeps_input) * width
    if norm is NOTHING:
        return 0.0
    ends, linear = FLOAT32 * _keeps_norm_input(norm), _layer(use, "final_layer.linear")
    if head is None:
        scaled = _has_output_gradient(_layer(use, "adaLN_modulation.1"))
        return (ends + FLOAT32 * scaled + size * linear.keeps_input) * width
    modulation = _layer(use, "token_modulation.1")
    ends += FLOAT32 * _has_output_gradient(modulation) + size * modulation.keeps_input
    return (ends + size * linear.keeps_input + 2 * size) * head.hidden_size
