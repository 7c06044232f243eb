"""Check of the inputs that a model is called with."""

import torch
from torch import Tensor

from dit.conditions import Conditions, LabelsOrConditions
from dit.config import DiTConfig, UViTConfig
from raydit.errors import InvalidInput


def check_inputs(config: DiTConfig | UViTConfig, x: Tensor, t: Tensor, y: LabelsOrConditions) -> Tensor | None:
    """Return the labels of y, or None for an unconditional model, after a check that all inputs fit the model.

    x: latents, expected (N, C, H, W). t: timesteps, expected (N,). y: labels, expected (N,) if the model has classes,
    or Conditions with no other field.
    Raises InvalidInput if shapes, or labels on the CPU, do not fit the model, or if y has conditions beside labels.
    """
    channels, (height, width) = config.in_channels, config.latent_size
    if tuple(x.shape[1:]) != (channels, height, width):
        raise InvalidInput(
            f"latents have shape {tuple(x.shape)}",
            f"(N, {channels}, {height}, {width}) for this model",
            "set the model's input_size and in_channels to those of the latents, or encode images of another size",
        )
    if tuple(t.shape) != (x.shape[0],):
        raise InvalidInput(
            f"timesteps have shape {tuple(t.shape)} for {x.shape[0]} latents",
            f"({x.shape[0]},)",
            "give one timestep per image",
        )
    labels = _labels_alone(y) if isinstance(y, Conditions) else y
    if config.num_classes == 0:
        return None
    if labels is None or tuple(labels.shape) != (x.shape[0],):
        found = "are missing" if labels is None else f"have shape {tuple(labels.shape)}"
        raise InvalidInput(
            f"labels {found} for {x.shape[0]} latents",
            f"({x.shape[0]},)",
            "give one class per image, null_class for no label",
        )
    # On a GPU reading the values would make the host wait; there, the embedding asserts that they are in range.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= config.num_labels:
            raise InvalidInput(
                f"labels range from {low} to {high}",
                f"0 to {config.num_labels - 1} for this model",
                "check num_classes against the class names of the latent data set",
            )
    return labels


def _labels_alone(conditions: Conditions) -> Tensor | None:
    """Return the labels. Raises InvalidInput if there are other conditions, which a class model would ignore."""
    others = [name for name in conditions.given() if name != "labels"]
    if others:
        raise InvalidInput(
            f"conditions with {', '.join(others)} for a model of classes",
            "labels alone",
            "leave the others out, or use a model that is conditioned on them",
        )
    return conditions.labels
