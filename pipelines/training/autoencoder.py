"""Training the autoencoder: what each worker does, and how rank 0 finishes it."""

from contextlib import closing
from pathlib import Path

from cluster import storage
from pipelines.config.recipe import Recipe
from pipelines.images.grids import labelled_grid, save_png
from pipelines.latents.autoencoder import RECORD

TRAINING = "training"
"""Folder beside it of the checkpoints that its training goes on from; removed at the end."""


RECONSTRUCTIONS = "reconstructions.png"


GRID_COLUMNS = 10
"""Images in a row of them; there are two."""


STATISTICS_IMAGES = 4096


def autoencoder_worker(settings: dict) -> None:
    """What every worker does: fetch the images, build the autoencoder, take up a checkpoint, train, finish."""
    import ray
    import torch

    from dit.autoencoder import AutoencoderObjective, create_autoencoder
    from dit.checkpoint import restore, save_checkpoint
    from dit.train import create_state, train
    from pipelines.checkpoints import stored as checkpoints
    from pipelines.training.batches import image_batches, prefetched
    from pipelines.training.order import Share
    from pipelines.training.worker import CheckpointWriter, Worker

    recipe: Recipe = settings["config"]
    config = recipe.autoencoder.train
    assert config is not None, "the driver starts workers only where [autoencoder.train] is set"
    worker = Worker.of_group(config, settings["mailbox"])
    blocks = ray.get(settings["images"])
    torch.manual_seed(recipe.seed)
    module = create_autoencoder(
        image_size=recipe.images.size,
        latent_channels=config.latent_channels,
        downsample=config.downsample,
        width=config.width,
    )
    network = AutoencoderObjective(module, config.kl_weight).to(worker.device)
    state = create_state(network, config, worker.wrap)
    training = storage.join(settings["folder"], TRAINING)
    if newest := checkpoints.newest(training):
        restore(state, newest)
    side = recipe.images.size // config.downsample
    batches = image_batches(
        blocks,
        latent_shape=(config.latent_channels, side, side),
        seed=recipe.seed,
        share=Share(worker.rank, worker.num_workers, config.global_batch_size),
        first_batch=state.batches,
        device=worker.device,
    )

    def write(snapshot) -> None:
        def save(folder: Path) -> None:
            save_checkpoint(snapshot, folder, {"stage": "autoencoder"}, {"seed": recipe.seed})

        checkpoints.write(training, snapshot.step, save)

    def losses(model, batch):
        share = len(batch.images) * worker.num_workers / config.global_batch_size
        return {name: value * share for name, value in model(batch.images, batch.noise).items()}

    writer = CheckpointWriter(worker, write)
    with closing(prefetched(batches)) as ahead:
        train(state, ahead, losses, config, report=worker.report, save=writer.save)
    writer.wait()
    if worker.rank == 0:
        state.ema.copy_to(network)
        finish_autoencoder(module.cpu(), settings["folder"], blocks, ray.get(settings["held_out"]))


def finish_autoencoder(module, folder: str, blocks: list, held_out: list) -> None:
    """Measure the latents' statistics and the reconstruction, and put diffusers' folder there with its record last."""
    import numpy as np
    import torch

    from dit.autoencoder import Autoencoder, describe_autoencoder, psnr, save_autoencoder

    module.eval()
    images = np.concatenate(blocks)[:STATISTICS_IMAGES]
    scale = latent_statistics(Autoencoder(module), images)
    local = Path(storage.local_folder_for(folder))
    save_autoencoder(module, local, scale)
    aside = np.concatenate(held_out)[:STATISTICS_IMAGES] if held_out else images
    which = f"{len(aside):,} {'held-out' if held_out else 'training'} images"
    decoded = reconstructed(Autoencoder.load(local), aside)
    save_png(reconstruction_grid(aside, decoded, which), str(local / RECONSTRUCTIONS))
    record = {
        "psnr": psnr(torch.from_numpy(aside), torch.from_numpy(decoded)),
        "psnr_images": which,
        "autoencoder": describe_autoencoder(local),
    }
    storage.write_json_atomically(str(local / RECORD), record)
    if not storage.is_local(folder):
        storage.publish_folder(str(local), folder, last=RECORD)


def latent_statistics(autoencoder, images):
    """Per-channel mean and std of raw posterior draws over images, uint8 (N, H, W, 3)."""
    import torch

    from dit.autoencoder import LatentScale, images_from_uint8

    moments = torch.cat(
        [autoencoder.encode(images_from_uint8(batch)) for batch in torch.from_numpy(images).split(64)]
    ).double()
    mean, log_variance = moments.chunk(2, dim=1)
    variance = mean.var(dim=(0, 2, 3), correction=0) + log_variance.exp().mean(dim=(0, 2, 3))
    return LatentScale(tuple(mean.mean(dim=(0, 2, 3)).tolist()), tuple(variance.sqrt().tolist()))


def reconstructed(autoencoder, images):
    """Images, uint8 (N, H, W, 3), encoded (posterior mean) and decoded."""
    import torch

    from dit.autoencoder import images_from_uint8

    decoded = []
    for batch in torch.from_numpy(images).split(64):
        mean = autoencoder.encode(images_from_uint8(batch)).chunk(2, dim=1)[0]
        decoded.append(autoencoder.decode(autoencoder.scale.scale(mean)))
    return torch.cat(decoded).numpy()


def reconstruction_grid(images, decoded, which: str):
    """A few images, each above its reconstruction; from all over, because neighbours are of one class."""
    import numpy as np

    chosen = np.linspace(0, len(images) - 1, min(len(images), 2 * GRID_COLUMNS), dtype=int)
    rows = []
    for part in np.array_split(chosen, 2):
        rows += [(which.split()[1], images[part]), ("decoded", decoded[part])]
    return labelled_grid(rows)
