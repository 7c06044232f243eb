"""Encode images with an autoencoder on a device, into float16 moments as they are stored."""

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config.encode import EncodeConfig
from pipelines.latents.autoencoder import AutoencoderHandle, is_autoencoder_of
from raydit.compilers import require_compiler
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    import torch


class MomentsEncoder:
    """Encodes images, and their horizontal flips if encode.flip is set, into moments on one device."""

    def __init__(
        self,
        autoencoder: AutoencoderHandle,
        settings: EncodeConfig,
        device: "torch.device",
        recorded: Mapping[str, Any] | None = None,
    ):
        """Load the autoencoder. recorded: its record; raises InvalidInput if this worker finds another one."""
        from dit.autoencoder import MEMORY_FORMATS, Autoencoder
        from dit.precision import weights_dtype

        folder = autoencoder.folder()
        if recorded is not None and not is_autoencoder_of(recorded, folder):
            raise InvalidInput(
                f"autoencoder.id: found another autoencoder in {folder} on {platform.node()}",
                f"the one of sha256 {recorded['sha256'][:12]}, as where the command runs",
                "copy the same files to all machines",
            )
        self.settings, self.device = settings, device
        self.memory_format = MEMORY_FORMATS[settings.layout_on(device.type)]
        self.autoencoder = Autoencoder.load(folder, device, weights_dtype(settings.dtype), self.memory_format)
        if settings.compile:
            require_compiler(device.type == "cuda")
            self.autoencoder.module.encoder.compile()

    def encode_with_flip(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the moments of images, and those of their horizontal flips: no rows unless encode.flip is set.

        images: uint8 (N, H, W, 3). Moments: float16 (N, *moments_shape).
        """
        moments = self.encode(images)
        return moments, self.encode(images[:, :, ::-1]) if self.settings.flip else moments[:0]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images uint8 (N, H, W, 3) into moments float16 (N, *moments_shape), infinite if beyond its range."""
        import torch

        from dit.autoencoder import images_from_uint8
        from dit.precision import tf32_products

        moments, batch_size, is_gpu = [], self.settings.batch_size, self.device.type == "cuda"
        for start in range(0, max(1, len(images)), batch_size):
            batch = torch.zeros((batch_size, *images.shape[1:]), dtype=torch.uint8, pin_memory=is_gpu)
            part = images[start : start + batch_size]
            # Always a full batch: kernels chosen by batch size would make a shard's bytes depend on its length.
            batch[: len(part)] = torch.from_numpy(part.copy())  # contiguous, also if it is a flip of no images
            on_device = batch.to(self.device, non_blocking=True)
            pixels = images_from_uint8(on_device).contiguous(memory_format=self.memory_format)
            with tf32_products(self.device, self.settings.dtype):
                encoded = self.autoencoder.encode(pixels)
            moments.append(encoded[: len(part)].half())
        return torch.cat(moments).cpu().numpy()  # only now, so that a GPU need not wait for the host between batches
