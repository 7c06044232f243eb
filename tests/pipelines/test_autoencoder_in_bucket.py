"""An autoencoder that is trained into a bucket: published completely, and fetched for encoding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_recipe
from tiny_images import image_rows

from cluster import storage
from dit.autoencoder import Autoencoder, create_autoencoder, describe_autoencoder
from pipelines.autoencoder import train_autoencoder
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.encode import encode
from pipelines.latents.autoencoder import AutoencoderHandle
from pipelines.latents.verify import verify
from pipelines.stage import StageContext
from pipelines.training.autoencoder.autoencoder_quality import ReconstructionQuality
from pipelines.training.autoencoder.autoencoder_result import finish_autoencoder
from pipelines.training.group.worker import Worker


def test_an_autoencoder_in_a_bucket_equals_one_on_disk(s3_bucket, tmp_path):
    images = image_rows(tmp_path / "images", np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    worker = Worker(0, 1, torch.device("cpu"), lambda message: None)
    for output in (str(tmp_path), s3_bucket):
        torch.manual_seed(0)
        module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
        with pytest.raises(FileNotFoundError, match="no finished autoencoder in .*Run `raydit autoencoder`"):
            AutoencoderHandle("autoencoder", output).folder()
        quality = ReconstructionQuality(worker, images, None)
        for _ in range(2):  # a worker dies after writing the record, and its replacement finishes too
            finish_autoencoder(module, f"{output}/autoencoder", images, quality, False, AutoencoderTrainConfig())
    here, there = (AutoencoderHandle("autoencoder", output) for output in (str(tmp_path), s3_bucket))
    assert there.describe() == here.describe() and here.folder() == tmp_path / "autoencoder"
    assert there.folder().is_relative_to(storage.cache_folder("fetched"))
    Autoencoder.load(there.folder())
    names = storage.list_files(f"{s3_bucket}/autoencoder")
    assert {name: storage.read_bytes(f"{s3_bucket}/autoencoder/{name}") for name in names} == {
        path.name: path.read_bytes() for path in (tmp_path / "autoencoder").iterdir()
    }
    assert list(Path(storage.cache_folder("beside")).iterdir()) == []


@pytest.mark.slow
def test_the_jobs_train_and_encode_in_a_bucket(s3_bucket, tmp_path, local_ray):
    config = replace(tiny_recipe(tmp_path), output=f"{s3_bucket}/output")
    with StageContext(config) as context:
        handle = train_autoencoder(config, context=context)
        recorded = storage.read_json(f"{config.output}/autoencoder/raydit.json")
        assert describe_autoencoder(handle.folder()) == recorded["autoencoder"]
        assert CheckpointFolder(f"{config.output}/autoencoder/training").finished_steps() == []
        dataset = encode(config, context=context)
    assert dataset.autoencoder["sha256"] == recorded["autoencoder"]["sha256"]
    assert all(check.ok for check in verify(dataset))
