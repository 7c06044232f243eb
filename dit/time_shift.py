"""Time shift of a flow: more steps, or more training, where noise is strong, as larger latents need.

A noise level sigma = 1 - t becomes a sigma / (1 + (a - 1) sigma) with a > 0; both ends of the path stay where they are.
Imports no torch, so that recipes are validated without its start-up time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from raydit.errors import InvalidInput

TimeShift = Literal["sd3", "dimension", "flux"]
"""Published rules for a, besides a number."""

SD3_SHIFT = 3.0
"""The shift of Stable Diffusion 3 at 1024 pixels: Esser et al. 2024, section 5.3.2 (https://arxiv.org/abs/2403.03206)."""
BASE_DIMENSION = 4096
"""Values of the latents for which "dimension" shifts nothing: 4 x 32 x 32 (https://arxiv.org/abs/2510.11690)."""
FLUX_POINTS = ((256, 0.5), (4096, 1.15))
"""Numbers of tokens, and the log of a there; "flux" joins them by a line, as FLUX.1's published code does."""


def shift_factor(
    rule: float | TimeShift, latent_shape: Sequence[int] | None = None, num_tokens: int | None = None
) -> float:
    """Return the factor a of a shift: the number itself, or what a published rule gives for latents.

    "sd3" is 3; "dimension" is sqrt(C H W / 4096); "flux" is the exponential of a linear function of num_tokens.
    latent_shape: (C, H, W), for "dimension". num_tokens: of the model, for "flux".
    Raises InvalidInput for another rule, or a number that is not positive and finite.
    """
    if rule == "sd3":
        return SD3_SHIFT
    if rule == "dimension":
        assert latent_shape is not None, "the rule depends on the latents"
        return math.sqrt(math.prod(latent_shape) / BASE_DIMENSION)
    if rule == "flux":
        assert num_tokens is not None, "the rule depends on the model"
        (few, log_few), (many, log_many) = FLUX_POINTS
        return math.exp(log_few + (log_many - log_few) * (num_tokens - few) / (many - few))
    if isinstance(rule, str) or not (math.isfinite(rule) and rule > 0):
        found, expected = f"time_shift is {rule!r}", "a number above 0, or one of sd3, dimension, flux"
        raise InvalidInput(found, expected, "leave it out for no shift")
    return float(rule)


def shift_time(t: Any, factor: float) -> Any:
    """Return shifted times t / (t + a (1 - t)), which is 1 - a sigma / (1 + (a - 1) sigma) for sigma = 1 - t.

    t: a number or a tensor, in [0, 1], with noise at 0. factor: a; 1 shifts nothing.
    """
    return t / (t + factor * (1 - t))


def time_grid(steps: int, shift: float | None) -> Iterator[tuple[float, float, float]]:
    """Yield the start and the end of each of a sampler's steps from t = 0 to 1, and the inverse of its length.

    Steps have equal lengths before the shift. The inverse is that of equal steps exactly, which keeps older samples.
    """
    for i in range(steps):
        start, end = i / steps, (i + 1) / steps
        if shift is None:
            yield start, end, steps
        else:
            start, end = shift_time(start, shift), shift_time(end, shift)
            yield start, end, 1 / (end - start)
