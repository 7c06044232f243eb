"""The loss of diffusion and flow training, image by image and as a worker's part of the mean."""

from collections.abc import Callable

from torch import Tensor, nn

from dit.conditions import LabelsOrConditions
from dit.diffusion import GaussianDiffusion
from dit.precision import network_precision
from pipelines.training.data.batches import LatentBatch, Process
from pipelines.training.metrics import quartile_sums
from pipelines.training.settings import TrainWorkerSettings


def image_losses(
    model: nn.Module,
    process: Process,
    dtype: str,
    latents: Tensor,
    t: Tensor,
    conditions: LabelsOrConditions,
    noise: Tensor,
) -> dict[str, Tensor]:
    """Return the losses of each image, (n,) float32 by name, with the network in the precision `dtype`.

    Other arguments are those of `training_losses` of the process.
    """

    def forward(x: Tensor, t: Tensor, y: LabelsOrConditions) -> Tensor:
        with network_precision(x.device, dtype):
            output = model(x, t, y)
        return output.float()

    return process.training_losses(forward, latents, t, conditions, noise)


def latent_losses(
    settings: TrainWorkerSettings, process: Process, num_workers: int
) -> Callable[[nn.Module, LatentBatch], dict[str, Tensor]]:
    """Return the losses function of `dit.train.train`: a micro-batch's contribution to the mean over the share."""
    # The mean share, not this worker's own: where the batch does not divide, all images must have the same weight.
    share = settings.train.global_batch_size / num_workers
    dtype, end = settings.train.dtype, last_timestep(process)

    def losses(model: nn.Module, batch: LatentBatch) -> dict[str, Tensor]:
        terms = image_losses(model, process, dtype, batch.latents, batch.t, batch.conditions, batch.noise)
        quartiles = quartile_sums(terms["loss"], batch.t, end)
        return {name: values.sum() / share for name, values in (terms | quartiles).items()}

    return losses


def last_timestep(process: Process) -> float:
    """Return the end of the interval [0, end] that the timesteps of a process lie in."""
    return process.num_timesteps if isinstance(process, GaussianDiffusion) else 1.0
