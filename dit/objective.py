"""The process that a model is trained on, built from the settings that recipes and checkpoints record."""

from typing import Any

from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching
from raydit.errors import InvalidInput


def create_process(kind: str, **settings: Any) -> GaussianDiffusion | FlowMatching:
    """Build the process that `kind` names, "flow" or "diffusion", with `settings` as arguments of its constructor.

    Raises InvalidInput for another kind, an unknown choice or a value out of range.
    """
    if kind == "flow":
        return FlowMatching(**settings)
    if kind == "diffusion":
        return GaussianDiffusion(**settings)
    raise InvalidInput(f"objective kind is {kind!r}", "'flow' or 'diffusion'", "choose one of them")
