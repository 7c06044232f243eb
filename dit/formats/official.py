"""Weights files of the official DiT and U-ViT code.

Such a file contains no configuration. The names and shapes of the weights determine all of it except the number of
heads, which comes from the named size that fits the weights or from the arguments in a training checkpoint; otherwise
it must be given.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.adaptation.comparison import meaning_of
from dit.config import (
    MODEL_NAMES,
    UVIT_NAMES,
    DiTConfig,
    ProcessKind,
    UViTConfig,
    config_from_dict,
    named_config,
)
from dit.formats.foreign_weights import ForeignWeights, choose_weights, describe_dtypes, to_float32
from dit.formats.shards import find_index, read_shards
from dit.formats.weights import check_finite, check_weights, read_weights
from dit.layers.embeddings import position_embedding
from dit.model import meta_state
from raydit.errors import InvalidInput

SIZE_FIELDS = ("architecture", "depth", "hidden_size", "num_heads", "patch_size", "final_conv")
"""Fields of a configuration that the name of a model fixes."""

POSITION_TOLERANCE = 1e-2
"""Largest difference from a sine-cosine table: half precision rounds."""
MAX_GRIDS = 8
PROJECTORS = "projectors."
"""Prefix of the layers with which REPA aligns features in training; samples need none of them.

Source: Yu et al. 2024 (https://arxiv.org/abs/2410.06940). Its weights count the time of a flow from the data.
"""


@dataclass(frozen=True)
class OfficialWeights:
    """Content of an official file; weights are in float32."""

    config: DiTConfig | UViTConfig
    """Configuration that the weights were recognised as."""
    model: dict[str, Tensor]
    """The trained weights, or the averaged weights if the file contains no others."""
    ema: dict[str, Tensor]
    """The averaged weights."""
    step: int
    """Number of training steps, from the file name that the official code gives; 0 if it contains none."""
    seed: int
    """Seed among the arguments of a training checkpoint; 0 without them."""
    taken: str
    """What was taken from the file, in words; empty if it is a bare state dict in float32."""


def read_official(file: str | Path, model: str | None = None, **known: Any) -> OfficialWeights:
    """Read a state dict, as published, or a training checkpoint ("model", "ema", "opt", "args").

    Wrappers, prefixes and dtypes that other code leaves in files are removed (see `dit.formats.foreign_weights`). file:
    may be the index of shards, or a folder with one. model: one of MODEL_NAMES or UVIT_NAMES that the weights must fit.
    known: fields of the configuration, such as num_heads. Raises NotFound, or InvalidInput if the weights do not fit
    the model or are not finite; the message lists the first differences, and what the weights look like.
    """
    file = Path(file)
    index = find_index(file)
    content = read_weights(file) if index is None else read_shards(index)
    arguments = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    seed = arguments.get("global_seed")
    found = choose_weights(content, file)
    if aligned := any(name.startswith(PROJECTORS) for name in found.ema):
        found = _without_projectors(found)
        known = {"flow_time": "noise", **known}
    config = recognise(found.ema, model or _known_name(arguments.get("model")), **known)
    hint = f"The weights look like {looks_like(found.ema)}."
    expected = meta_state(config)

    def usable(state: dict[str, Tensor]) -> dict[str, Tensor]:
        check_weights(expected, state, hint)
        converted = to_float32(state, file)
        check_finite(converted, file)
        return converted

    ema = usable(found.ema)
    shards = [] if index is None else [f"the shards of {index.name}"]
    dropped = [f"names without {PROJECTORS}*"] if aligned else []
    return OfficialWeights(
        config=config,
        model=ema if found.model is found.ema else usable(found.model),
        ema=ema,
        step=int(file.stem) if file.stem.isdecimal() else 0,
        seed=seed if isinstance(seed, int) else 0,
        taken=", ".join([*shards, *found.taken, *dropped, *describe_dtypes(found.ema)]),
    )


def _without_projectors(found: ForeignWeights) -> ForeignWeights:
    model, ema = (
        {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTORS)}
        for state in (found.model, found.ema)
    )
    return ForeignWeights(ema if found.model is found.ema else model, ema, found.taken)


def _known_name(name: Any) -> str | None:
    return name if name in MODEL_NAMES else None


def recognise(weights: Mapping[str, Tensor], model: str | None = None, **known: Any) -> DiTConfig | UViTConfig:
    """Return the configuration of a state dict with official names; its tensors may be on the meta device.

    model: a name that fixes the size, even if the weights have another. known: fields that override those found.
    Raises InvalidInput for names of other networks, and if num_heads is neither given nor that of a named size.
    """
    found = _shape_fields(weights)
    if model is not None:
        found = _with_named_size(found, model)
    elif fitting := _fitting_name(found):
        found["num_heads"] = named_config(fitting).num_heads
    elif "num_heads" not in known:
        raise InvalidInput(
            f"num_heads cannot be read from weights that look like {looks_like(weights)}",
            "a named size, or the number of attention heads",
            "give num_heads (--set model.num_heads=N)",
        )
    if known.get("num_classes") == _label_rows(weights) > 0:
        found["class_dropout_prob"] = 0.0  # every row is a class, so that no row means "no label"
    return config_from_dict({**found, **known})


def _with_named_size(found: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the fields found in weights, with the size replaced by that of a named model."""
    named = asdict(named_config(model))
    kept = {name: value for name, value in found.items() if name in named and name not in SIZE_FIELDS}
    # The weights determine the grid of patches, and the name the patch size; the size of latents follows.
    grid = _scaled(found["input_size"], found["patch_size"], named["patch_size"])
    return {**named, **kept, "input_size": grid}


def looks_like(weights: Mapping[str, Tensor]) -> str:
    """Return in words which model weights are of, judged by their names and shapes: a name, or the dimensions."""
    found = _shape_fields(weights)
    kind = "U-ViT" if found["architecture"] == "uvit" else "DiT"
    size = f"depth {found['depth']}, hidden_size {found['hidden_size']}, patch_size {found['patch_size']}"
    return _fitting_name(found) or f"a {kind} of no named size ({size})"


def _fitting_name(found: Mapping[str, Any]) -> str | None:
    """Return the name of the model with the architecture, depth, width and patch size that were found, or None."""
    for name in (*MODEL_NAMES, *UVIT_NAMES):
        named = asdict(named_config(name))
        if all(named[key] == found[key] for key in ("architecture", "depth", "hidden_size", "patch_size")):
            return name
    return None


def _shape_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return all fields that names and shapes determine. Raises InvalidInput if they are of another network."""
    try:
        return _uvit_fields(weights) if "decoder_pred.weight" in weights else _dit_fields(weights)
    except (KeyError, ValueError, AttributeError, TypeError, IndexError, ZeroDivisionError) as error:
        first = ", ".join(sorted(map(str, weights))[:5]) or "nothing"
        missing = f", but no {error.args[0]}" if isinstance(error, KeyError) else ""
        raise InvalidInput(
            f"these weights are neither those of a DiT nor of a U-ViT: found {first}{missing}",
            "official names such as x_embedder.proj.weight and blocks.0.attn.qkv.weight",
            "pass the folder if the weights are part of a diffusers pipeline",
        ) from None


def _dit_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    out_channels = weights["final_layer.linear.weight"].shape[0] // patch**2
    modulation = weights.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is not None:
        conditioning = "adaln_zero" if modulation.shape[0] == 6 * width else "adaln"
    else:
        conditioning = "cross_attention" if "blocks.0.cross_attn.q.weight" in weights else "in_context"
    rows = _label_rows(weights)
    return {
        "architecture": "dit",
        "input_size": _latent_size(weights["pos_embed"], patch),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _count(weights, r"blocks\.(\d+)\."),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": max(0, rows - 1),
        "learn_sigma": out_channels == 2 * channels,
        "conditioning": conditioning,
    }


def _uvit_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    rows = _label_rows(weights)
    num_conditions = 2 if rows else 1
    return {
        "architecture": "uvit",
        "input_size": _latent_size(weights["pos_embed"][:, num_conditions:], patch),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 2 * _count(weights, r"in_blocks\.(\d+)\."),
        "mlp_ratio": weights["mid_block.mlp.fc1.weight"].shape[0] / width,
        "num_classes": max(0, rows - 1),
        "qkv_bias": "mid_block.attn.qkv.bias" in weights,
        "mlp_time_embed": "time_embed.0.weight" in weights,
        "final_conv": "final_layer.weight" in weights,
        "first_timestep": 1,
    }


def _label_rows(weights: Mapping[str, Tensor]) -> int:
    """Return the number of rows of the label table: one per class and, if labels were dropped, one for "no label"."""
    names = ("y_embedder.embedding_table.weight", "label_emb.weight")
    return next((len(weights[name]) for name in names if name in weights), 0)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in weights) if match})


def _latent_size(positions: Tensor, patch: int) -> int | tuple[int, int]:
    """Return the side, or height and width, of the latents that a position table (1, T, D) is for.

    The values of a sine-cosine table distinguish 4 x 16 patches from 8 x 8. A learned table, or one on the meta
    device, is taken to be that of a square.
    """
    _, tokens, width = positions.shape
    side = round(tokens**0.5)
    if not positions.is_meta and width % 4 == 0:
        square = [side] if side**2 == tokens else []
        for columns in (*square, *_possible_columns(positions[0])):
            rows = tokens // columns
            table = position_embedding(width, rows, columns)
            if bool((positions[0].double() - table).abs().max() < POSITION_TOLERANCE):
                return rows * patch if rows == columns else (rows * patch, columns * patch)
    if side**2 != tokens:
        raise ValueError(f"{tokens} positions do not form a grid")
    return side * patch


def _possible_columns(positions: Tensor) -> list[int]:
    """Return the numbers of columns of a grid whose second row may begin where a table (T, D) says, at most a few.

    The first half of a position's values depends on its column alone, and repeats after a row.
    """
    tokens, half = len(positions), positions.shape[1] // 2
    columns = positions[:, :half].double()
    same = (columns - columns[0]).abs().amax(dim=1) < 2 * POSITION_TOLERANCE
    found = [position for position in torch.nonzero(same[1:]).flatten().tolist() if tokens % (position + 1) == 0]
    return [position + 1 for position in found[:MAX_GRIDS]] + [tokens]


def _scaled(size: int | tuple[int, int], patch: int, new_patch: int) -> int | tuple[int, int]:
    sides = [side // patch * new_patch for side in ((size,) if isinstance(size, int) else size)]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def published_objective(config: DiTConfig | UViTConfig, kind: ProcessKind = "diffusion") -> dict[str, Any]:
    """Return the objective that the published weights of an architecture were trained with.

    kind: "flow" for SiT's and REPA's weights, which share DiT's architecture. Raises InvalidInput for a U-ViT with
    "flow", and for REPA's weights without.
    """
    if isinstance(config, DiTConfig) and config.flow_time is not None and kind != "flow":
        raise InvalidInput(
            f"objective is {kind!r} for weights that count the time of a flow, as REPA's do",
            "'flow'",
            "import them with the objective flow",
        )
    if isinstance(config, UViTConfig):
        if kind == "flow":
            raise InvalidInput(
                "objective is 'flow' for U-ViT's official weights", "'diffusion'", "remove the objective"
            )
        return {"kind": "diffusion", "schedule": "scaled_linear", "prediction": "eps", "variance": "fixed_small"}
    if kind == "flow":
        return {"kind": "flow"}
    variance = "learned_range" if config.learn_sigma else "fixed_large"
    return {"kind": "diffusion", "schedule": "linear", "prediction": "eps", "variance": variance}


def check_official(config: DiTConfig | UViTConfig, objective: Mapping[str, Any]) -> None:
    """Raise InvalidInput, naming a field, if the official code would compute something else with the weights.

    objective: as checkpoints record it. `raydit import` has no option for another one than those published.
    """
    is_flow = isinstance(config, DiTConfig) and objective["kind"] == "flow"
    published = meaning_of(published_objective(config, "flow" if is_flow else "diffusion"))
    if isinstance(config, UViTConfig):
        height, width = config.latent_size
        assumed: dict[str, tuple[Any, Any]] = {"first_timestep": (config.first_timestep, 1)}
        assumed |= {"width of the latents": (width, height)}
    else:
        refinements = [*("qk_norm", "norm", "mlp", "position", "timestep_frequency_shift", "mlp_norm_eps")]
        refinements += ["head_width", "flow_time"]
        assumed = {name: (getattr(config, name), getattr(DiTConfig(), name)) for name in refinements}
    trained = meaning_of(objective)
    assumed |= {f"objective.{name}": (trained.get(name), value) for name, value in published.items()}
    for name, (found, expected) in assumed.items():
        if found != expected:
            raise InvalidInput(
                f"{name} is {found!r}, which an official file cannot express",
                f"{expected!r}, which the official code assumes",
                "keep the checkpoint as it is",
            )


def fields_to_give(config: DiTConfig | UViTConfig) -> dict[str, Any]:
    """Return the fields of a configuration that `read_official` must be given, because no file tells them.

    They are the number of heads of a model that has no named size, and the number of classes without a null class,
    whose last class would be taken for it.
    """
    name = _fitting_name(asdict(config))
    fields: dict[str, Any] = {}
    if name is None or named_config(name).num_heads != config.num_heads:
        fields["num_heads"] = config.num_heads
    if config.num_classes and config.null_class is None:
        fields["num_classes"] = config.num_classes
    return fields
