"""The autoencoder: a pretrained one by id, or one trained on the recipe's own images by Ray Train."""

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster import storage
from pipelines.artifacts import Artifact, settings_identity
from pipelines.config.recipe import Recipe
from pipelines.config.training import BESIDE_THE_WEIGHTS, AutoencoderTrainConfig
from pipelines.images.grids import labelled_grid, save_png
from pipelines.images.open import Listing, open_source
from pipelines.stage import StageContext, job, located
from pipelines.training.group import run_workers
from pipelines.training.messages import Report, Saved

RECORD = "raydit.json"
"""Written last into the folder of an autoencoder trained here: what it is made from, and how good it is."""
TRAINING = "training"
"""Folder beside it of the checkpoints that its training goes on from; removed at the end."""
OURS = "autoencoder"
"""Id of the autoencoder trained here: its folder, relative to the output."""
RECONSTRUCTIONS = "reconstructions.png"
PICTURED = 10
"""Images in a row of them; there are two."""
BLOCK_IMAGES = 2048
STATISTICS_IMAGES = 4096


@dataclass(frozen=True)
class AutoencoderHandle:
    """An autoencoder that may not be loaded yet."""

    id: str
    """Hub id or folder as in the recipe; for one trained here, its folder relative to the output."""
    output: str
    """Absolute path or URI."""

    def folder(self, *, download: bool = True) -> Path:
        """Local folder with its weights, fetched if it is elsewhere. Raises FileNotFoundError, telling what to do."""
        from dit.autoencoder import locate_autoencoder

        if self.id != OURS:
            return locate_autoencoder(self.id, download=download).absolute()
        folder = storage.join(self.output, OURS)
        if not storage.exists(storage.join(folder, RECORD)):
            raise FileNotFoundError(f"no finished autoencoder in {folder}; run `raydit autoencoder` with the recipe")
        return Path(storage.fetch_folder(folder))

    def located(self) -> "AutoencoderHandle":
        """The same for workers: those of a cluster run in other working directories."""
        return replace(self, id=str(Path(self.id).absolute())) if self.id != OURS and Path(self.id).is_dir() else self

    def describe(self, *, download: bool = True) -> dict:
        """What latents and checkpoints record of it."""
        from dit.autoencoder import describe_autoencoder

        return {"id": self.id, **describe_autoencoder(self.folder(download=download))}


def autoencoder_of(config: Recipe) -> AutoencoderHandle:
    """The autoencoder that a recipe uses."""
    return AutoencoderHandle(config.autoencoder.id or OURS, storage.absolute(config.output))


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
    Artifact("autoencoder", folder, identity).claim()
    finished = storage.join(folder, RECORD)
    if storage.exists(finished):
        record = storage.read_json(finished)
        context.skipped("autoencoder", f"{record['psnr']:.1f} dB, in {folder}")
        return handle

    with context.run("autoencoder", identity) as run:
        run.params({"images": asdict(config.images), "autoencoder": asdict(settings)})
        progress = context.progress("autoencoder", total=settings.steps, unit="steps")

        def hear(message: Report | Saved) -> None:
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
        run_workers(context, "autoencoder", settings, autoencoder_worker, worker_settings, hear)
        record = storage.read_json(finished)
        storage.remove_folder(storage.join(folder, TRAINING))
        run.metrics({"autoencoder/psnr": record["psnr"]}, settings.steps)
        picture = Path(storage.on_this_machine(folder)) / RECONSTRUCTIONS
        if not storage.is_local(folder):
            storage.write_atomically(str(picture), storage.read_bytes(storage.join(folder, RECONSTRUCTIONS)))
        run.image(picture, "reconstructions", settings.steps)
        progress.done(f"{record['psnr']:.1f} dB on {record['psnr_images']}, in {folder}")
    return handle


def image_blocks(config: Recipe, listing: Listing) -> list:
    """References to uint8 arrays (n, size, size, 3) in Ray's object store, which workers of a node share."""
    import ray

    from pipelines.images.preprocess import read_cropped

    images = located(config.images)

    @ray.remote(num_cpus=1)
    def read(keys: list[str]):
        return read_cropped(images, keys)[0]

    starts = range(0, len(listing), BLOCK_IMAGES)
    return [read.remote(listing.keys[start : start + BLOCK_IMAGES]) for start in starts]


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
        finish(module.cpu(), settings["folder"], blocks, ray.get(settings["held_out"]))


def finish(module, folder: str, blocks: list, held_out: list) -> None:
    """Measure the latents' statistics and the reconstruction, and put diffusers' folder there with its record last."""
    import numpy as np
    import torch

    from dit.autoencoder import Autoencoder, describe_autoencoder, psnr, save_autoencoder

    module.eval()
    images = np.concatenate(blocks)[:STATISTICS_IMAGES]
    scale = latent_statistics(Autoencoder(module), images)
    local = Path(storage.on_this_machine(folder))
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

    chosen = np.linspace(0, len(images) - 1, min(len(images), 2 * PICTURED), dtype=int)
    rows = []
    for part in np.array_split(chosen, 2):
        rows += [(which.split()[1], images[part]), ("decoded", decoded[part])]
    return labelled_grid(rows)


def autoencoder_identity(config: Recipe, settings: AutoencoderTrainConfig, listing: Listing) -> dict:
    """What the weights depend on."""
    return {
        "seed": config.seed,
        "images": {"digest": listing.digest, "size": config.images.size, "crop": config.images.crop},
        "autoencoder": settings_identity(settings, BESIDE_THE_WEIGHTS),
    }
