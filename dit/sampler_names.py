"""The samplers by name. Imports no torch, so that recipes are validated without its start-up time."""

from typing import Literal

from dit.config import ProcessKind

SdeDiffusion = Literal["constant", "sbdm", "sigma", "decreasing", "increasing_decreasing"]
"""Diffusion of the sampler "sde" as a function of time; `dit.sde` has the formulas."""

NUM_TIMESTEPS = 1000
"""Timesteps of a diffusion, as in the papers."""

SAMPLER_PROCESSES: dict[str, tuple[ProcessKind, ...]] = {
    "ddpm": ("diffusion",),
    "ddim": ("diffusion",),
    "euler": ("flow",),
    "heun": ("flow",),
    "sde": ("flow",),
    "dpmpp_2m": ("diffusion", "flow"),
}
"""Name of every sampler, and the kinds of process that it integrates. `dit.samplers` has a function sample_<name>."""


def most_steps(sampler: str, kind: str) -> int | None:
    """Return the most steps that a sampler takes on a process of a kind; None: as many as one likes."""
    if kind != "diffusion":
        return None
    return NUM_TIMESTEPS - 1 if sampler == "dpmpp_2m" else NUM_TIMESTEPS


def fitting_samplers(kind: str) -> list[str]:
    """Return the samplers that integrate a kind of process; the first is that of a recipe that names none."""
    return [name for name, kinds in SAMPLER_PROCESSES.items() if kind in kinds]
