"""What a model may be called with, and the errors for everything else."""

import torch
from torch import Tensor

from dit.config import DiTConfig, UViTConfig


def check_inputs(config: DiTConfig | UViTConfig, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    """Raise ValueError when shapes, or classes on the CPU, do not fit the model; y is not read without classes."""
    channels, (height, width) = config.in_channels, config.latent_size
    if tuple(x.shape[1:]) != (channels, height, width):
        raise ValueError(
            f"latents have shape {tuple(x.shape)}, but this model expects "
            f"(N, {channels}, {height}, {width}): set the model's input_size and in_channels to the "
            "latents', or encode at another size"
        )
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(
            f"timesteps have shape {tuple(t.shape)}, but {x.shape[0]} latents need ({x.shape[0]},): "
            "give one timestep per image"
        )
    if config.num_classes == 0:
        return
    if y is None or tuple(y.shape) != (x.shape[0],):
        found = "missing" if y is None else f"of shape {tuple(y.shape)}"
        raise ValueError(
            f"labels are {found}, but {x.shape[0]} latents need ({x.shape[0]},): "
            "give one class per image, null_class for none"
        )
    # On a GPU this look at the values would make the host wait; there, the embedding itself asserts.
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= config.num_labels:
            raise ValueError(
                f"labels run from {low} to {high}, but this model knows 0 to {config.num_labels - 1}: "
                "check num_classes against the latent data set's class names"
            )
