"""Provides what dit imports of annotated-types where that is missing, as on a machine that has only torch.

dit marks the fields of its configurations with bounds, which only pydantic reads, when it validates a recipe.
"""

import importlib.util
import sys
import types


class Mark:
    """A bound of a field, such as Gt(0)."""

    def __init__(self, bound: float) -> None:
        self.bound = bound


if importlib.util.find_spec("annotated_types") is None:
    sys.modules["annotated_types"] = types.SimpleNamespace(**dict.fromkeys(("Ge", "Gt", "Le", "Lt"), Mark))
