"""Four parameterizations of x_t = alpha x0 + sigma eps: the noise, the clean latents, the velocity and the score.

Given x_t, each of them determines the other three. Functions take tensors or numbers with alpha² + sigma² = 1.
The velocity is v = alpha eps - sigma x0 (Salimans & Ho 2022, section 4, https://arxiv.org/abs/2202.00512). The score,
the gradient of the log density of x_t, is -eps / sigma (Song et al. 2020, https://arxiv.org/abs/2011.13456).
"""

from typing import Literal

from torch import Tensor

from dit.config import Prediction, Weighting

Parameterization = Literal[Prediction, "score"]


def x0_and_eps(
    kind: Parameterization, prediction: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return clean latents and noise, given x_t and its parameterization `kind`.

    All are (N, C, H, W), or broadcast to it.
    """
    if kind == "v":
        return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
    if kind == "x0":
        return prediction, (x_t - alpha * prediction) / sigma
    eps = prediction if kind == "eps" else -sigma * prediction
    return (x_t - sigma * eps) / alpha, eps


def from_x0_and_eps(
    kind: Parameterization, x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Return the parameterization `kind`, (N, C, H, W), of the given clean latents and noise.

    Inverse of `x0_and_eps`.
    """
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "score":
        return -eps / sigma
    return x0 if kind == "x0" else eps


def convert_prediction(
    prediction: Tensor,
    x_t: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    source: Parameterization,
    target: Parameterization,
) -> Tensor:
    """Convert a prediction for x_t from the parameterization `source` to `target`; all are (N, C, H, W)."""
    return from_x0_and_eps(target, *x0_and_eps(source, prediction, x_t, alpha, sigma), alpha, sigma)


def loss_weight(weighting: Weighting, kind: Prediction, snr: Tensor, gamma: float) -> Tensor:
    """Return the weight of the squared error at signal-to-noise ratios alpha² / sigma², in the shape of `snr`.

    min_snr: min(snr, gamma) for x0, that over snr for eps, and that over snr + 1 for v, which all put the same
    weight on the error in the clean latents. Source: Hang et al. 2023, section 3.4 (https://arxiv.org/abs/2303.09556).
    """
    if weighting == "none":
        return snr.new_ones(snr.shape)
    on_x0 = snr.clamp(max=gamma)
    return {"x0": on_x0, "eps": on_x0 / snr, "v": on_x0 / (snr + 1)}[kind]
