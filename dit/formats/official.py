"""Weights files of the official DiT and U-ViT code: recognised by their names and shapes, and written.

A file of theirs holds no configuration. Nearly all of it shows in the shapes; the number of heads does not, so it
is taken from the named size that the rest fits, from a training checkpoint's arguments, or must be given.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.config import (
    MODEL_NAMES,
    UVIT_NAMES,
    DiTConfig,
    ProcessKind,
    UViTConfig,
    config_from_dict,
    named_config,
)
from dit.formats.weights import check_weights, read_weights
from dit.layers.embeddings import position_embedding
from dit.model import build_model

SIZE_FIELDS = ("architecture", "depth", "hidden_size", "num_heads", "patch_size", "final_conv")
"""What a model's name fixes."""


@dataclass(frozen=True)
class OfficialWeights:
    """What an official file holds, in float32."""

    config: DiTConfig | UViTConfig
    model: dict[str, Tensor]
    """The weights as trained; the averaged ones again where the file has no others."""
    ema: dict[str, Tensor]
    step: int
    """Training steps, by the number that the official code puts into the file's name; 0 where there is none."""
    seed: int


def read_official(file: str | Path, model: str | None = None, **known: Any) -> OfficialWeights:
    """Read a state dict (as published) or a training checkpoint ("model", "ema", "opt", "args").

    model: one of MODEL_NAMES or UVIT_NAMES that the weights must be of. known: fields of the configuration, such as
    num_heads. Raises FileNotFoundError, or ValueError, listing the first names that differ and what the weights
    look like, if they are of another model.
    """
    file = Path(file)
    content = read_weights(file)
    arguments = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    weights = {which: content.get(which) for which in ("model", "ema")}
    averaged = next((part for part in (weights["ema"], weights["model"]) if isinstance(part, dict)), content)
    trained = weights["model"] if isinstance(weights["model"], dict) else averaged
    config = recognise(averaged, model or _named(arguments.get("model")), **known)
    expected = meta_state(config)
    hint = f"The weights look like {looks_like(averaged)}."
    for part in (averaged, trained):
        check_weights(expected, part, hint)
    in_float32 = {name: tensor.float() for name, tensor in averaged.items()}
    return OfficialWeights(
        config=config,
        model=in_float32 if trained is averaged else {name: tensor.float() for name, tensor in trained.items()},
        ema=in_float32,
        step=int(file.stem) if file.stem.isdecimal() else 0,
        seed=arguments.get("global_seed", 0),
    )


def _named(name: Any) -> str | None:
    return name if name in MODEL_NAMES else None


def meta_state(config: DiTConfig | UViTConfig) -> dict[str, Tensor]:
    """Names and shapes of a model's state dict; takes no memory."""
    with torch.device("meta"):
        return build_model(config).state_dict()


def recognise(weights: Mapping[str, Tensor], model: str | None = None, **known: Any) -> DiTConfig | UViTConfig:
    """The configuration of a state dict with official names, which may lie on the meta device.

    model: a name that fixes the size, whatever the weights look like. known: fields that are taken as given.
    Raises ValueError for names of another family, and where num_heads is neither known nor that of a named size.
    """
    found = _shape_fields(weights)
    if model is not None:
        found = _resized(found, model)
    elif fitting := _fitting_name(found):
        found["num_heads"] = named_config(fitting).num_heads
    elif "num_heads" not in known:
        raise ValueError(
            f"num_heads cannot be read from weights that look like {looks_like(weights)}: expected a named size, or "
            "the number of attention heads beside the file. Give num_heads (--set model.num_heads=N)"
        )
    if known.get("num_classes") == _label_rows(weights) > 0:
        found["class_dropout_prob"] = 0.0  # every row is a class: there is none for "no label"
    return config_from_dict({**found, **known})


def _resized(found: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Fields that weights tell, with the size that a name fixes in place of theirs."""
    named = asdict(named_config(model))
    kept = {name: value for name, value in found.items() if name in named and name not in SIZE_FIELDS}
    # The grid, not the latents' size, is what weights tell: the patch is the name's.
    grid = _scaled(found["input_size"], found["patch_size"], named["patch_size"])
    return {**named, **kept, "input_size": grid}


def looks_like(weights: Mapping[str, Tensor]) -> str:
    """What weights are by their names and shapes, in words."""
    found = _shape_fields(weights)
    kind = "U-ViT" if found["architecture"] == "uvit" else "DiT"
    size = f"depth {found['depth']}, hidden_size {found['hidden_size']}, patch_size {found['patch_size']}"
    return _fitting_name(found) or f"a {kind} of no named size ({size})"


def _fitting_name(found: Mapping[str, Any]) -> str | None:
    """The named model whose depth, width and patch are those found."""
    for name in (*MODEL_NAMES, *UVIT_NAMES):
        named = asdict(named_config(name))
        if all(named[key] == found[key] for key in ("architecture", "depth", "hidden_size", "patch_size")):
            return name
    return None


def _shape_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every field that names and shapes tell. Raises ValueError when they are no DiT's and no U-ViT's."""
    try:
        return _uvit_fields(weights) if "decoder_pred.weight" in weights else _dit_fields(weights)
    except (KeyError, ValueError, AttributeError) as error:
        first = ", ".join(sorted(map(str, weights))[:5]) or "nothing"
        missing = f", but no {error.args[0]}" if isinstance(error, KeyError) else ""
        raise ValueError(
            f"these weights are no DiT's and no U-ViT's: found {first}{missing}; expected official names such as "
            "x_embedder.proj.weight and blocks.0.attn.qkv.weight. Of a diffusers pipeline, give the folder"
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
    """Rows of the label table: the classes and, unless they were trained without, one for "no label"."""
    names = ("y_embedder.embedding_table.weight", "label_emb.weight")
    return next((len(weights[name]) for name in names if name in weights), 0)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in weights) if match})


def _latent_size(positions: Tensor, patch: int) -> int | tuple[int, int]:
    """Side, or height and width, of the latents whose grid a position table (1, T, D) is for.

    The sine-cosine table itself tells 4 x 16 patches from 8 x 8; a learned one, or one without values, is a square's.
    """
    _, tokens, width = positions.shape
    side = round(tokens**0.5)
    if side**2 == tokens and (positions.is_meta or _is_grid(positions, side, side)):
        return side * patch
    if not positions.is_meta:
        for rows in (rows for rows in range(1, tokens + 1) if tokens % rows == 0):
            if _is_grid(positions, rows, tokens // rows):
                return rows * patch, tokens // rows * patch
    if side**2 != tokens:
        raise ValueError(f"{tokens} positions are no grid")
    return side * patch


def _is_grid(positions: Tensor, rows: int, columns: int) -> bool:
    width = positions.shape[2]
    if width % 4:
        return False
    table = position_embedding(width, rows, columns)
    return bool((positions[0].double() - table).abs().max() < 1e-2)  # half precision rounds


def _scaled(size: int | tuple[int, int], patch: int, new_patch: int) -> int | tuple[int, int]:
    sides = [side // patch * new_patch for side in ((size,) if isinstance(size, int) else size)]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def published_objective(config: DiTConfig | UViTConfig, kind: ProcessKind = "diffusion") -> dict[str, Any]:
    """What the published weights of an architecture were trained for; "flow" for SiT's, in DiT's architecture.

    Raises ValueError for a flow in U-ViT's.
    """
    if isinstance(config, UViTConfig):
        if kind == "flow":
            raise ValueError("objective is 'flow', but U-ViT's official weights are of a diffusion: leave it out")
        return {"kind": "diffusion", "schedule": "scaled_linear", "prediction": "eps", "variance": "fixed_small"}
    if kind == "flow":
        return {"kind": "flow"}
    variance = "learned_range" if config.learn_sigma else "fixed_large"
    return {"kind": "diffusion", "schedule": "linear", "prediction": "eps", "variance": variance}


def check_official(config: DiTConfig | UViTConfig) -> None:
    """Refuse to write weights as an official file when the official code would compute something else with them.

    Raises ValueError naming the first field.
    """
    if isinstance(config, UViTConfig):
        plain: dict[str, Any] = {"first_timestep": 1}
    else:
        refinements = ("qk_norm", "norm", "mlp", "position", "timestep_frequency_shift", "mlp_norm_eps")
        plain = {name: getattr(DiTConfig(), name) for name in refinements}
    for name, expected in plain.items():
        found = getattr(config, name)
        if found != expected:
            raise ValueError(
                f"{name} is {found!r}, but an official file cannot say so and its reader assumes {expected!r}: its "
                "outputs would differ. Keep the checkpoint as it is"
            )
