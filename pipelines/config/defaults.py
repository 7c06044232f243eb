"""Remove optional fields that only repeat the default, so that a recipe with and without them has the same identity."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def leave_out_defaults(config: Any, defaults: Mapping[str, Any]) -> None:
    """Set the fields of a frozen config that repeat their default to what they are where they are left out."""
    left_out = {field.name: field.default for field in fields(config)}
    for name, default in defaults.items():
        if getattr(config, name) == default:
            object.__setattr__(config, name, left_out[name])
