"""Overhead of the autoencoder job, measured against a bare torch loop with one batch in memory.

The job and the loop run in turn, as in `test_train_speed.py`.
"""

from functools import partial

import pytest
import torch
from bare_loops import BareLoops, alternate_job_and_loops
from harness import Timing

from cluster import storage
from dit.autoencoder import create_autoencoder
from dit.autoencoders.objective import AutoencoderObjective
from pipelines.config.reader import load_recipe
from pipelines.images.held_out import split_images
from pipelines.latents.autoencoder import TRAINED_AUTOENCODER
from pipelines.latents.recorded_images import list_images
from pipelines.stage import StageContext
from pipelines.training.autoencoder.autoencoder_worker import (
    IMAGES,
    TRAINING,
    AutoencoderWorkerSettings,
    autoencoder_worker,
)
from pipelines.training.data.image_files import write_image_files
from pipelines.training.group.run_workers import RAY_FOLDER

pytestmark = pytest.mark.benchmark
ROUNDS, STEPS = 3, 60


def build_autoencoder(config, image_size, batch_size):
    """Return the digits' autoencoder with its losses, and the loss of its forward pass on one batch in memory."""
    side = image_size // config.downsample
    module = create_autoencoder(
        image_size=image_size,
        latent_channels=config.latent_channels,
        downsample=config.downsample,
        width=config.width,
    )
    images = torch.rand(batch_size, 3, image_size, image_size) * 2 - 1
    noise = torch.randn(batch_size, config.latent_channels, side, side)
    return AutoencoderObjective(module, config.kl_weight, "l1"), lambda model: model(images, noise)["loss"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_job_against_a_bare_loop(tmp_path, results, quick, num_workers):
    num_rounds, steps = (1, STEPS // 2) if quick else (ROUNDS, STEPS)

    def recipe(rounds):
        flags = {
            "steps": rounds * steps,
            "num_workers": num_workers,
            "log_every": steps // 2,
            "checkpoint_every": steps,
        }
        overrides = [f"autoencoder.train.{name}={value}" for name, value in flags.items()]
        return load_recipe("pipelines/recipes/digits.toml", [f"output={tmp_path / 'output'}", *overrides])

    config = recipe(1).autoencoder.train
    size, batch_size = recipe(1).images.size, config.global_batch_size
    loops = BareLoops(partial(build_autoencoder, config, size, batch_size // num_workers), num_workers, tmp_path / "at")
    with StageContext(recipe(1)) as context:
        context.prepare_work(config, "autoencoder")
        listing, _ = split_images(recipe(1).images, list_images(recipe(1))[1])
        folder = recipe(1).folder(TRAINED_AUTOENCODER)
        files = write_image_files(recipe(1).images, listing, storage.join(folder, TRAINING, IMAGES))
        rounds = [
            AutoencoderWorkerSettings(
                train=recipe(number).autoencoder.train,
                seed=0,
                random="counter",
                image_size=size,
                folder=folder,
                images=files,
                held_out=[],
                max_quarantined=0.05,
                extractor=None,
            )
            for number in range(1, num_rounds + 1)
        ]
        ray_folder = recipe(1).folder(RAY_FOLDER)
        listeners, bare = alternate_job_and_loops(
            context, "autoencoder", autoencoder_worker, rounds, loops, steps, ray_folder
        )
    ours = [batch_size / listener.metric("images_per_second") for listener in listeners]
    waits = [listener.metric("data_wait") for listener in listeners]
    measured = f"{batch_size / Timing(ours).median:.1f} images/s, data wait {Timing(waits).median:.2%}"
    name = f"the demo's, {num_workers} worker{'s' if num_workers > 1 else ''}"
    against = "bare torch loop" if num_workers == 1 else "bare torch loop with DDP"
    results.add_speedup("autoencoder job", name, measured, against, Timing(ours), Timing(bare))
