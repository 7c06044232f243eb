"""Check of the inputs that a model is called with."""

import torch
from torch import Tensor

from dit.config import DiTConfig, UViTConfig
from raydit.errors import InvalidInput


def check_inputs(config: DiTConfig | UViTConfig, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    """Raise InvalidInput if shapes, or classes on the CPU, do not fit the model.

    x: latents, expected (N, C, H, W). t: timesteps, expected (N,). y: classes, expected (N,) if the model has any.
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
    if config.num_classes == 0:
        return
    if y is None or tuple(y.shape) != (x.shape[0],):
        found = "are missing" if y is None else f"have shape {tuple(y.shape)}"
        raise InvalidInput(
            f"labels {found} for {x.shape[0]} latents",
            f"({x.shape[0]},)",
            "give one class per image, null_class for no label",
        )
    # On a GPU reading the values would make the host wait; there, the embedding asserts that they are in range.
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= config.num_labels:
            raise InvalidInput(
                f"labels range from {low} to {high}",
                f"0 to {config.num_labels - 1} for this model",
                "check num_classes against the class names of the latent data set",
            )
