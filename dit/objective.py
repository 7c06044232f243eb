"""What the model learns, by the settings that a recipe and a checkpoint record."""

from dit.diffusion import GaussianDiffusion
from dit.flow import FlowMatching


def create_process(kind: str, **settings) -> GaussianDiffusion | FlowMatching:
    """The diffusion or flow that `kind` names, with its constructor's settings."""
    if kind == "flow":
        return FlowMatching(**settings)
    if kind == "diffusion":
        return GaussianDiffusion(**settings)
    raise ValueError(f"objective kind: found {kind!r}, expected 'flow' or 'diffusion'")
