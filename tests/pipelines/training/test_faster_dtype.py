"""Stages that begin in float32 on a GPU say once what another dtype takes; with another dtype they say nothing."""

import numpy as np
import pytest
import torch
from fakes import FakeContext
from tiny_encode import Context, encode_here, recipe
from tiny_images import image_rows
from tiny_training import Training, training_recipe

from pipelines.config.autoencoder_training import AutoencoderTrainConfig
from pipelines.encode import encode
from pipelines.training.autoencoder.autoencoder_worker import AutoencoderWorkerSettings, train_on_images
from pipelines.training.group.messages import Notice
from pipelines.training.group.worker import Worker

SAID = "trains in float32; on a GPU "


@pytest.fixture
def fast_device(monkeypatch):
    """Take the device of workers for a GPU with TF32 where a dtype is suggested; they compute on the CPU."""
    monkeypatch.setattr("pipelines.training.faster_dtype.has_tf32", lambda device: True)


def said(notices):
    return [text for text in notices if text.startswith(SAID)]


def test_a_training_says_it_where_it_begins_and_not_where_it_resumes(tmp_path, fast_device):
    (line,) = said(Training(training_recipe(tmp_path)).run(stop_after=4).notices)
    assert "train.dtype = 'tf32' is about 4 times as fast, 'bfloat16' with train.compile = true about 9 times" in line
    assert said(Training(training_recipe(tmp_path)).run().notices) == []
    other = training_recipe(
        tmp_path, tmp_path / "other", encode={"output": str(tmp_path / "output/latents")}, dtype="tf32"
    )
    assert said(Training(other).run().notices) == []


def test_a_training_on_a_cpu_says_nothing(tmp_path):
    assert said(Training(training_recipe(tmp_path)).run().notices) == []


@pytest.mark.parametrize(("dtype", "lines"), [(None, 1), ("bfloat16", 0)])
def test_the_training_of_an_autoencoder_says_it(tmp_path, fast_device, dtype, lines):
    messages = []
    train = AutoencoderTrainConfig(
        steps=1, global_batch_size=4, warmup_steps=0, downsample=2, width=8, checkpoint_every=1, dtype=dtype
    )
    settings = AutoencoderWorkerSettings(
        train=train, seed=3, random="counter", image_size=16, folder=str(tmp_path / "out"), images=[], held_out=[],
        max_quarantined=0.05, extractor=None,
    )  # fmt: skip
    images = image_rows(tmp_path / "images", np.zeros((4, 16, 16, 3), np.uint8))
    worker = Worker(0, 1, torch.device("cpu"), messages.append, lambda: False)
    train_on_images(worker, settings, images, image_rows(tmp_path / "none"))
    found = said(message.text for message in messages if isinstance(message, Notice))
    assert len(found) == lines and all(
        "autoencoder.train.dtype = 'bfloat16' is about 1.5 times" in line for line in found
    )


@pytest.mark.parametrize(("dtype", "lines"), [("float32", 1), ("bfloat16", 0)])
def test_encoding_on_gpus_says_it_before_the_work(tmp_path, capsys, dtype, lines):
    with pytest.raises(AssertionError, match="without Ray"):
        encode(recipe(tmp_path, "encode.gpus_per_worker=1", f"encode.dtype={dtype}"), context=FakeContext())
    line = "encodes in float32; on a GPU encode.dtype = 'bfloat16' is about 1.5 times as fast"
    assert capsys.readouterr().out.count(line) == lines


def test_encoding_on_cpus_says_nothing(tmp_path, capsys, monkeypatch):
    encode_here(recipe(tmp_path), monkeypatch, Context())
    assert "encodes in float32" not in capsys.readouterr().out
