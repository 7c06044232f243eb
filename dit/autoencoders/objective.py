"""What an autoencoder is trained on: the errors of its reconstructions, the KL term, and the terms that are asked for.

Source: Rombach et al. 2022 (latent diffusion, arXiv 2112.10752), appendix G.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dit.autoencoders.losses import PatchDiscriminator, PerceptualDistance, adaptive_weight, hinge_loss
from dit.precision import network_precision

Reconstruction = Literal["mse", "l1"]
"""Errors of a reconstruction that an autoencoder is trained on."""


def _alone(value: Tensor) -> Tensor:
    return value


class AutoencoderObjective(nn.Module):
    """Training objective of an autoencoder, and of the discriminator that it may be trained against.

    It is a module, so that a data-parallel wrapper sees one forward pass and one backward pass. Neither network gets a
    gradient from the other's terms, so that their sum trains both at once, as two optimizers in turn would that both
    use the same reconstructions.
    """

    def __init__(
        self,
        autoencoder: Any,
        kl_weight: float,
        reconstruction: Reconstruction = "mse",
        *,
        dtype: str = "float32",
        perceptual: PerceptualDistance | None = None,
        perceptual_weight: float = 1.0,
        discriminator: PatchDiscriminator | None = None,
        adversarial_weight: float = 0.0,
        mean_over_workers: Callable[[Tensor], Tensor] = _alone,
    ) -> None:
        """reconstruction: which error is trained on, the mean of squared ("mse") or of absolute differences ("l1").

        dtype: precision of the networks (`dit.precision`); losses are float32. perceptual: a distance that is added to
        that error with its weight. discriminator: what the adversarial term, with its weight, is of. mean_over_workers:
        averages a small tensor over all processes, which makes the adaptive weight that of the global batch.
        """
        super().__init__()
        self.autoencoder: Any = autoencoder
        self.discriminator = discriminator
        self.kl_weight, self.reconstruction, self.dtype = kl_weight, reconstruction, dtype
        # In a list, because it is not trained: its weights belong neither into checkpoints nor into averages.
        self._perceptual, self.perceptual_weight = [perceptual], perceptual_weight
        self.adversarial_weight, self._mean_over_workers = adversarial_weight, mean_over_workers

    def forward(self, images: Tensor, noise: Tensor, adversarial: bool = False) -> dict[str, Tensor]:
        """Return the scalars {"loss", "mse", "kl"} and those of the terms that are asked for; kl is in nats per image.

        images: (N, 3, H, W) in [-1, 1]. noise: (N, C, h, w), standard normal. adversarial: whether the adversarial
        terms, which are 0 otherwise, are part of the loss. The terms are "l1", "perceptual", and with a discriminator
        "adversarial", "adaptive_weight" and "discriminator". "loss" is their weighted sum, on which the backward pass
        is run.
        """
        with network_precision(images.device, self.dtype):
            posterior = self.autoencoder.encode(images).latent_dist
            if posterior.parameters.dtype != torch.float32:
                posterior = type(posterior)(posterior.parameters.float())
            reconstruction = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        reconstruction = reconstruction.float()
        errors = {"mse": nn.functional.mse_loss(reconstruction, images)}
        if self.reconstruction == "l1":
            errors["l1"] = nn.functional.l1_loss(reconstruction, images)
        error = errors[self.reconstruction]
        if (distance := self._perceptual[0]) is not None:
            with network_precision(images.device, self._perceptual_dtype(images.device)):
                errors["perceptual"] = distance(reconstruction, images)
            error = error + self.perceptual_weight * errors["perceptual"]
        kl = posterior.kl().mean()
        loss = error + self.kl_weight * kl / images[0].numel()
        if self.discriminator is None:
            return {"loss": loss, **errors, "kl": kl}
        terms = self._adversarial_terms(images, reconstruction, error) if adversarial else _no_terms(loss)
        weight = self.adversarial_weight * terms["adaptive_weight"]
        loss = loss + weight * terms["adversarial"] + terms["discriminator"]
        return {"loss": loss, **errors, "kl": kl, **terms}

    def _perceptual_dtype(self, device: torch.device) -> str:
        # Frozen weights are cast at every use, and CPUs take twice as long for depthwise convolutions in bfloat16.
        return "float32" if device.type == "cpu" else self.dtype

    def _adversarial_terms(self, images: Tensor, reconstruction: Tensor, error: Tensor) -> dict[str, Tensor]:
        """Return the autoencoder's adversarial term, its adaptive weight, and the discriminator's own loss."""
        assert self.discriminator is not None, "asked for with a discriminator only"
        both = torch.cat([images, reconstruction.detach()])
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        with network_precision(images.device, self.dtype):
            real, fake = self.discriminator(both).float().chunk(2)
            adversarial = -functional_call(self.discriminator, frozen, (reconstruction,)).float().mean()
        last_layer = self.autoencoder.decoder.conv_out.weight
        return {
            "adversarial": adversarial,
            "adaptive_weight": adaptive_weight(error, adversarial, last_layer, self._mean_over_workers),
            "discriminator": hinge_loss(real, fake),
        }


def _no_terms(loss: Tensor) -> dict[str, Tensor]:
    """Return the terms before the discriminator takes part, so that reports have the same names throughout."""
    return {name: torch.zeros_like(loss) for name in ("adversarial", "adaptive_weight", "discriminator")}
