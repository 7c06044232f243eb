"""Types and bounds of a transformer's configuration, which may come from somebody else's config.json."""

from dataclasses import fields
from typing import Any

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
}
"""Largest values, far beyond the models that exist: what a configuration claims is allocated."""
TYPES: dict[Any, tuple[str, type | tuple[type, ...]]] = {
    int: ("an integer", int),
    float: ("a number", (int, float)),
    bool: ("true or false", bool),
}
"""By the type of a field: its name in messages, and the types that a value may have."""


def check_types(config: Any) -> None:
    """Raise InvalidInput for a field of a TransformerConfig with a value of another type."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "input_size":
            sides = value if isinstance(value, tuple) else (value,)
            is_right, expected = len(sides) <= 2 and all(_is(side, int) for side in sides), "an integer, or two"
        else:
            is_right, expected = _is(value, field.type), TYPES.get(field.type, ("",))[0]
        if not is_right:
            raise InvalidInput(f"{field.name} is {str(value)[:100]!r}", expected, f"correct {field.name}")


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value is of the type of a field; choices are checked elsewhere."""
    if kind not in TYPES:
        return True
    return isinstance(value, TYPES[kind][1]) and (kind is bool) == isinstance(value, bool)


def check_sizes(config: Any) -> None:
    """Raise InvalidInput for a size in a TransformerConfig that is not positive, or that no model has."""
    for name, largest in MAX_SIZES.items():
        values = config.latent_size if name == "input_size" else (getattr(config, name),)
        if name != "num_classes" and not min(values) > 0:
            raise InvalidInput(f"{name} is {min(values)}", "a number above 0", f"set {name} to a positive number")
        if not max(values) <= largest:
            raise InvalidInput(f"{name} is {max(values):,}", f"at most {largest:,}", f"correct {name}")
