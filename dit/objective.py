"""The process that a model is trained on, built from the settings that recipes and checkpoints record."""

import inspect
from typing import Any

from dit.config_bounds import TYPES, is_of_type
from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from raydit.errors import InvalidInput


def create_process(kind: str, **settings: Any) -> GaussianDiffusion | FlowMatching:
    """Build the process that `kind` names, "flow" or "diffusion", with `settings` as arguments of its constructor.

    Raises InvalidInput for another kind, an unknown setting or choice, or a value of another type or out of range.
    """
    if kind not in ("flow", "diffusion"):
        raise InvalidInput(f"objective kind is {kind!r}", "'flow' or 'diffusion'", "choose one of them")
    process: type[GaussianDiffusion] | type[FlowMatching] = FlowMatching if kind == "flow" else GaussianDiffusion
    known = inspect.signature(process).parameters
    for name, value in settings.items():
        if name not in known:
            raise InvalidInput(
                f"objective.{name} is {str(value)[:100]!r}",
                f"a setting of a {kind}: {', '.join(known)}",
                f"remove {name}, or use the version of raydit that wrote it",
            )
        if not is_of_type(value, known[name].annotation):
            expected = TYPES[known[name].annotation][0]
            raise InvalidInput(f"objective.{name} is {str(value)[:100]!r}", expected, f"correct {name}")
    return process(**settings)
