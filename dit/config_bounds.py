"""Types and bounds of a transformer's configuration, which may come from somebody else's config.json."""

import difflib
from dataclasses import fields
from typing import Any, get_args

from raydit.errors import InvalidInput

MAX_SIZES = {
    "input_size": 1 << 14,
    "patch_size": 1 << 10,
    "in_channels": 1 << 14,
    "hidden_size": 1 << 16,
    "depth": 1 << 10,
    "num_heads": 1 << 12,
    "mlp_ratio": 1 << 8,
    "num_classes": 10_000_000,
    "head_width": 1 << 16,
    "head_depth": 1 << 10,
}
"""Largest values, far beyond the models that exist: what a configuration claims is allocated."""
TYPES: dict[Any, tuple[str, type | tuple[type, ...]]] = {
    int: ("an integer", int),
    float: ("a number", (int, float)),
    bool: ("true or false", bool),
    int | None: ("an integer", (int, type(None))),
    float | None: ("a number", (int, float, type(None))),
}
"""By the type of a field: its name in messages, and the types that a value may have."""


def check_types(config: Any) -> None:
    """Raise InvalidInput for a field of a TransformerConfig with a value of another type."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "input_size":
            sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
            is_right, expected = all(is_of_type(side, int) for side in sides), "an integer, or two"
        else:
            is_right, expected = is_of_type(value, field.type), TYPES.get(field.type, ("",))[0]
        if not is_right:
            raise InvalidInput(f"{field.name} is {str(value)[:100]!r}", expected, f"correct {field.name}")


def is_of_type(value: Any, kind: Any) -> bool:
    """Return whether a value is of the type of a field; true for types that are not in TYPES, such as choices."""
    if kind not in TYPES:
        return True
    return isinstance(value, TYPES[kind][1]) and (kind is bool) == isinstance(value, bool)


def check_sizes(config: Any) -> None:
    """Raise InvalidInput for a size in a TransformerConfig that is not positive, or that no model has."""
    for name, largest in MAX_SIZES.items():
        values = config.latent_size if name == "input_size" else (getattr(config, name, None),)
        if values == (None,):
            continue
        if name != "num_classes" and not min(values) > 0:
            raise InvalidInput(f"{name} is {min(values)}", "a number above 0", f"set {name} to a positive number")
        if not max(values) <= largest:
            raise InvalidInput(f"{name} is {max(values):,}", f"at most {largest:,}", f"correct {name}")
    if config.num_classes < 0:
        raise InvalidInput(f"num_classes is {config.num_classes}", "0 or more", "use 0 for an unconditional model")
    if not 0 <= config.class_dropout_prob < 1:
        raise InvalidInput(
            f"condition_dropout_prob is {config.class_dropout_prob}",
            "a number in [0, 1)",
            "use 0.1 as in the paper, or 0 for a model that is not going to be guided",
        )


def check_choices(config: Any, **choices: Any) -> None:
    """Raise InvalidInput for a field whose value is not among those of its Literal."""
    for name, literal in choices.items():
        found, known = getattr(config, name), get_args(literal)
        if found not in known:
            raise InvalidInput(f"{name} is {found!r}", f"one of {', '.join(known)}", nearest_name(found, known))


def nearest_name(name: str, known: tuple[str, ...], cutoff: float = 0.4) -> str:
    """Return advice to choose one of the known names, with the nearest one if there is any."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return f"choose one of them; did you mean {nearest[0]!r}?" if nearest else "choose one of them"


def check_wide_head(config: Any, heads_width: int) -> None:
    """Raise InvalidInput if only one field of a DiTConfig's wide head is given, or if its blocks cannot be built.

    heads_width: width of the wide head's attention heads, if it has more than one.
    """
    width, depth = config.head_width, config.head_depth
    if (width is None) != (depth is None):
        given, absent = ("head_width", "head_depth") if depth is None else ("head_depth", "head_width")
        raise InvalidInput(
            f"{given} is {getattr(config, given)} without {absent}",
            "both, for a model with a wide head, or neither",
            f"set {absent}, or remove {given}",
        )
    if width is None:
        return
    if config.conditioning != "adaln_zero":
        raise InvalidInput(
            f"head_width is {width} with conditioning = {config.conditioning!r}",
            "'adaln_zero', because the head is conditioned by adaLN-Zero as well",
            "remove conditioning, or head_width and head_depth",
        )
    multiple = 4 if width < heads_width else heads_width
    if width % multiple:
        raise InvalidInput(
            f"head_width is {width}",
            f"a multiple of {heads_width}, the width of its attention heads, or a multiple of 4 below {heads_width}",
            f"set head_width to {(width // multiple + 1) * multiple}",
        )
