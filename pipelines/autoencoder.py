"""The autoencoder: a pretrained one by id, or one trained on the recipe's own images by Ray Train."""

from dataclasses import asdict
from pathlib import Path

from cluster import storage
from pipelines.artifacts import Artifact, settings_identity
from pipelines.config.recipe import Recipe
from pipelines.config.training import NON_IDENTITY_FIELDS, AutoencoderTrainConfig
from pipelines.images.listing import Listing
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.latents.autoencoder import OURS, RECORD, AutoencoderHandle, autoencoder_of
from pipelines.stage import StageContext, job
from pipelines.training.autoencoder import RECONSTRUCTIONS, TRAINING, autoencoder_worker
from pipelines.training.group import run_workers
from pipelines.training.messages import Report, Saved

BLOCK_IMAGES = 2048


@job
def train_autoencoder(config: Recipe, *, context: StageContext) -> AutoencoderHandle:
    """Train the recipe's own autoencoder, or go on where an earlier run stopped. Nothing to do for a pretrained one."""
    handle = autoencoder_of(config)
    settings = config.autoencoder.train
    if settings is None:
        context.skipped("autoencoder", f"{handle.id} in {handle.folder()}")
        return handle
    folder = config.folder(OURS)
    listing, held_out = open_source(config.images).listing().split(config.images.held_out)
    identity = autoencoder_identity(config, settings, listing)
    Artifact("autoencoder", folder, identity).prepare()
    finished = storage.join(folder, RECORD)
    if storage.exists(finished):
        record = storage.read_json(finished)
        context.skipped("autoencoder", f"{record['psnr']:.1f} dB, in {folder}")
        return handle

    with context.run("autoencoder", identity) as run:
        run.params({"images": asdict(config.images), "autoencoder": asdict(settings)})
        progress = context.progress("autoencoder", total=settings.steps, unit="steps")

        def on_message(message: Report | Saved) -> None:
            if isinstance(message, Report):
                progress.to(message.step, mse=message.metrics["mse"])
                run.metrics({f"autoencoder/{name}": value for name, value in message.metrics.items()}, message.step)

        context.start_ray(settings, "autoencoder")
        worker_settings = {
            "config": config,
            "folder": folder,
            "images": image_blocks(config, listing),
            "held_out": image_blocks(config, held_out),
        }
        run_workers(context, "autoencoder", settings, autoencoder_worker, worker_settings, on_message)
        record = storage.read_json(finished)
        storage.remove_folder(storage.join(folder, TRAINING))
        run.metrics({"autoencoder/psnr": record["psnr"]}, settings.steps)
        picture = Path(storage.local_folder_for(folder)) / RECONSTRUCTIONS
        if not storage.is_local(folder):
            storage.write_atomically(str(picture), storage.read_bytes(storage.join(folder, RECONSTRUCTIONS)))
        run.image(picture, "reconstructions", settings.steps)
        progress.done(f"{record['psnr']:.1f} dB on {record['psnr_images']}, in {folder}")
    return handle


def image_blocks(config: Recipe, listing: Listing) -> list:
    """References to uint8 arrays (n, size, size, 3) in Ray's object store, which workers of a node share."""
    import ray

    from pipelines.images.preprocess import read_cropped

    images = with_absolute_paths(config.images)

    @ray.remote(num_cpus=1)
    def read(keys: list[str]):
        return read_cropped(images, keys)[0]

    starts = range(0, len(listing), BLOCK_IMAGES)
    return [read.remote(listing.keys[start : start + BLOCK_IMAGES]) for start in starts]


def autoencoder_identity(config: Recipe, settings: AutoencoderTrainConfig, listing: Listing) -> dict:
    """What the weights depend on."""
    return {
        "seed": config.seed,
        "images": {"digest": listing.digest, "size": config.images.size, "crop": config.images.crop},
        "autoencoder": settings_identity(settings, NON_IDENTITY_FIELDS),
    }
