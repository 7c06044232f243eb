"""Names under which a model's fields may be given, and the names under which they are recorded."""

from collections.abc import Mapping
from typing import Any

from raydit.errors import InvalidInput

SYNONYMS = {"condition_dropout_prob": "class_dropout_prob"}
"""Names of a model's fields, and the older names that stay the recorded ones, for the sake of earlier artifacts."""


def with_recorded_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's fields by the names under which they are recorded.

    Raises InvalidInput if a field is given under both of its names with different values.
    """
    renamed = dict(fields)
    for name, recorded in SYNONYMS.items():
        if name not in renamed:
            continue
        value = renamed.pop(name)
        if renamed.setdefault(recorded, value) != value:
            raise InvalidInput(
                f"{name} is {str(value)[:100]} and {recorded}, its older name, is {str(renamed[recorded])[:100]}",
                "one value",
                f"remove {recorded}",
            )
    return renamed
