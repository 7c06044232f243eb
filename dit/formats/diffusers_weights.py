"""Conversion of adaLN-Zero DiT weights between official names and diffusers' names.

diffusers has a copy of both embedders in every block, and separate layers for queries, keys and values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dit.config import DiTConfig
from dit.config_bounds import MAX_SIZES
from dit.formats.weights import check_weights
from dit.layers.embeddings import position_embedding
from dit.model import meta_state
from raydit.errors import InvalidInput

PIPELINE_NULL_CLASS = 1000
"""Class that DiTPipeline uses for "no label" in every model."""
LABELS = "y_embedder.embedding_table.weight"
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
BLOCK = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def to_diffusers(config: DiTConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments and the state dict of a DiTTransformer2DModel.

    They do not contain the frequency shift, which is 1 in diffusers.
    """
    table = _table_for_pipeline(config, weights)
    fields = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.latent_size[0],
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": len(table) - 1,  # diffusers adds a row for the null class
        "norm_eps": config.mlp_norm_eps,
    }
    state: dict[str, Tensor] = {}
    for official, diffusers_names, split in _names(config.depth):
        tensor = table if official == LABELS else weights[official]
        values = tensor.chunk(len(diffusers_names)) if split else [tensor] * len(diffusers_names)
        # Copies, because a safetensors file cannot contain a tensor twice.
        state |= {name: value.clone() for name, value in zip(diffusers_names, values, strict=True)}
    return fields, state


def from_diffusers(
    fields: Mapping[str, Any], state: Mapping[str, Tensor], num_classes: int | None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Return configuration and weights, in float32, of a DiTTransformer2DModel.

    fields: its arguments, plus timestep_frequency_shift and mlp_norm_eps of DiTConfig. state: its state dict.
    num_classes: number of classes that the pipeline names, or None for one less than the label table has rows.
    Raises InvalidInput if names differ, if the blocks have different embedders, because DiT has one for all blocks,
    if the label table lacks rows for named classes, or if it has rows that are neither a class nor the null class.
    """
    _check_numbers(fields)
    state = {name: tensor.float() for name, tensor in state.items() if name != "pos_embed.pos_embed"}
    depth, width = fields["num_layers"], fields["num_attention_heads"] * fields["attention_head_dim"]
    rows = fields["num_embeds_ada_norm"] + 1
    config = DiTConfig(
        input_size=fields["sample_size"],
        patch_size=fields["patch_size"],
        in_channels=fields["in_channels"],
        hidden_size=width,
        depth=depth,
        num_heads=fields["num_attention_heads"],
        num_classes=rows - 1 if num_classes is None else num_classes,
        class_dropout_prob=0.0 if num_classes == rows else 0.1,
        learn_sigma=fields["out_channels"] == 2 * fields["in_channels"],
        timestep_frequency_shift=fields["timestep_frequency_shift"],
        mlp_norm_eps=fields["mlp_norm_eps"],
    )
    if config.num_classes > rows:
        raise InvalidInput(
            f"found {config.num_classes:,} classes under id2label in model_index.json, and {rows:,} rows of labels",
            "a row for each class",
            "correct id2label, or remove it: the classes are then called by their numbers",
        )
    check_weights(_diffusers_meta(config, rows), state)
    weights = {"pos_embed": position_embedding(width, *config.grid_size).float()[None]}
    for official, diffusers_names, split in _names(depth):
        values = [state[name] for name in diffusers_names]
        different = [name for name, value in zip(diffusers_names, values, strict=True) if not value.equal(values[0])]
        if different and not split:
            raise InvalidInput(
                f"{different[0]} differs from {diffusers_names[0]}",
                "equal embedders in all blocks, because raydit's model has one for all blocks",
                "choose another pipeline: one whose blocks have separately trained embedders cannot be imported",
            )
        weights[official] = torch.cat(values) if split else values[0]
    if config.num_classes:
        weights[LABELS] = _without_repeated_rows(weights[LABELS], config)
    else:
        del weights[LABELS]
    return config, weights


def _check_numbers(fields: Mapping[str, Any]) -> None:
    """Raise InvalidInput for a number that is none, or far beyond those of any model, in a config from elsewhere."""
    largest = MAX_SIZES["num_classes"]
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "num_embeds_ada_norm"):
        if type(fields[name]) is not int or not 0 <= fields[name] <= largest:
            raise InvalidInput(
                f"transformer/config.json: found {name} = {str(fields[name])[:100]}",
                f"an integer from 0 to {largest:,}",
                "copy it again",
            )


def _names(depth: int) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each official name with diffusers' names for it, and whether those are chunks of it rather than copies."""
    blocks = [f"transformer_blocks.{i}." for i in range(depth)]
    for kind in ("weight", "bias"):
        for official, diffusers_name in ENDS.items():
            yield f"{official}.{kind}", [f"{diffusers_name}.{kind}"], False
        for official, diffusers_name in EMBEDDERS.items():
            if f"{official}.{kind}" != "y_embedder.embedding_table.bias":
                yield f"{official}.{kind}", [f"{block}norm1.emb.{diffusers_name}.{kind}" for block in blocks], False
        for i, block in enumerate(blocks):
            for official, parts in BLOCK.items():
                yield f"blocks.{i}.{official}.{kind}", [f"{block}{part}.{kind}" for part in parts], len(parts) > 1


def _diffusers_meta(config: DiTConfig, rows: int) -> dict[str, Tensor]:
    """Return the state dict of a DiTTransformer2DModel on the meta device: names and shapes without memory."""
    shapes = meta_state(config) | {LABELS: torch.empty(rows, config.hidden_size, device="meta")}
    expected: dict[str, Tensor] = {}
    for official, diffusers_names, split in _names(config.depth):
        values = shapes[official].chunk(len(diffusers_names)) if split else [shapes[official]] * len(diffusers_names)
        expected |= dict(zip(diffusers_names, values, strict=True))
    return expected


def _table_for_pipeline(config: DiTConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """Return a label table (rows, D) with which labels mean the same in DiTPipeline as here.

    The null row is repeated up to the pipeline's null class. A model without null class, or without classes, has no
    such row, and guidance in the pipeline fails on the missing row. Without classes all labels are zero vectors.
    """
    if config.num_classes == 0:
        return torch.zeros(1, config.hidden_size)
    table = weights[LABELS]
    if config.null_class is None:
        return table
    return torch.cat([table, table[-1:].expand(PIPELINE_NULL_CLASS - config.num_classes, -1)])


def _without_repeated_rows(table: Tensor, config: DiTConfig) -> Tensor:
    """Return the rows of the classes and the null row, if there is one, of a table that may repeat the null row."""
    null_rows = table[config.num_classes :]
    if len(null_rows) and not null_rows.equal(null_rows[:1].expand_as(null_rows)):
        raise InvalidInput(
            f"the label table has {len(table)} rows for {config.num_classes} named classes, with different rows after "
            "theirs",
            "one for the null class",
            "name all classes under id2label in model_index.json",
        )
    return table[: config.num_labels]
