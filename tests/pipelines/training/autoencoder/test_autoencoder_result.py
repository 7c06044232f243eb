"""Where and how the result of an autoencoder's training is computed: on the worker's device, by what is compiled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compile_counter import CompileCounter
from tiny_images import image_rows

from dit.autoencoder import create_autoencoder
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.training.autoencoder import autoencoder_worker
from pipelines.training.autoencoder.autoencoder_quality import ReconstructionQuality
from pipelines.training.autoencoder.autoencoder_result import RECONSTRUCTIONS, finish_autoencoder
from pipelines.training.autoencoder.autoencoder_worker import AutoencoderWorkerSettings, train_on_images
from pipelines.training.group.worker import Worker

TRAIN = AutoencoderTrainConfig(
    steps=2, global_batch_size=4, warmup_steps=0, downsample=2, width=8, checkpoint_every=2, validate_every=1
)


def worker():
    return Worker(0, 1, torch.device("cpu"), lambda message: None, lambda: False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (22, 16, 16, 3), dtype=np.uint8)
    return image_rows(tmp_path_factory.mktemp("images"), pixels)


def test_all_is_computed_on_the_device_of_the_worker_before_the_module_leaves_it(tmp_path, images, monkeypatch):
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    computed_after, move = [], module.cpu

    def leave():
        for half in (module.encoder, module.decoder):
            half.register_forward_pre_hook(lambda half, _: computed_after.append(type(half).__name__))
        return move()

    monkeypatch.setattr(module, "cpu", leave)
    finish_autoencoder(module, str(tmp_path), images, ReconstructionQuality(worker(), images, None), False, TRAIN)
    assert computed_after == [] and (tmp_path / RECONSTRUCTIONS).is_file()


@pytest.mark.parametrize("at_once", [3, 64])
def test_the_end_of_a_training_compiles_nothing_that_validation_has_not_compiled(
    tmp_path, images, monkeypatch, at_once
):
    """Batches of another size, and parameters that require no gradients, would compile every block again."""
    for module in ("autoencoder_quality", "autoencoder_result"):
        monkeypatch.setattr(f"pipelines.training.autoencoder.{module}.measured_at_once", lambda size: at_once)
    counter, before = CompileCounter(), []
    monkeypatch.setattr(autoencoder_worker, "compile_network", counter.compile)
    finish = autoencoder_worker.finish_autoencoder

    def note_and_finish(*args, **kwargs):
        before.append(counter.forward)
        finish(*args, **kwargs)

    monkeypatch.setattr(autoencoder_worker, "finish_autoencoder", note_and_finish)
    settings = AutoencoderWorkerSettings(
        train=replace(TRAIN, compile=True), seed=3, random="counter", image_size=16, folder=str(tmp_path / "out"),
        images=[], held_out=[], max_quarantined=0.05, extractor=None,
    )  # fmt: skip
    train_on_images(worker(), settings, images, images)
    assert before[0] > 0 and counter.forward == before[0]
