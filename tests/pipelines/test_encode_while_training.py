"""The whole story without stored moments, on Ray: encode, train by one and by two workers, evaluate."""

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_encode import recipe
from tiny_training import assert_equal, final_weights

from pipelines.encode import encode
from pipelines.evaluate import evaluate
from pipelines.stage import StageContext
from pipelines.train import train
from raydit.errors import InvalidInput

pytestmark = pytest.mark.slow  # four groups of workers

SETTINGS = ("encode.flip=true", "encode.batch_size=4", "train.steps=4", "images.held_out=0.3", "train.validate_every=2")


def run(config):
    with StageContext(config) as context:
        dataset = encode(config, context=context)
        return dataset, train(config, context=context)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, local_ray):
    """The recipes of finished outputs, by whether moments are stored and by the number of workers."""
    folder, found = tmp_path_factory.mktemp("story"), {}
    for store in (True, False):
        for workers in (1, 2):
            overrides = (f"encode.store={str(store).lower()}", f"train.num_workers={workers}")
            config = recipe(folder, *SETTINGS, *overrides, f"output={folder / f'{store}-{workers}'}")
            found[store, workers] = config
            run(config)
    return found


def test_weights_are_those_of_stored_moments_to_the_bit(trained):
    for workers in (1, 2):
        assert_equal(final_weights(trained[False, workers]), final_weights(trained[True, workers]))


def test_weights_of_one_and_two_workers_agree_to_rounding(trained):
    one, two = (final_weights(trained[False, workers]) for workers in (1, 2))
    for name, tensor in one.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_checkpoint_is_evaluated(trained):
    config = trained[False, 2]
    report = evaluate(f"{config.output}/checkpoints/step_0000004")
    assert report.metrics and report.real_baseline


def test_an_image_that_is_gone_ends_the_training_before_it_starts(trained, tmp_path):
    config = trained[False, 1]
    images = shutil.copytree(config.images.path, tmp_path / "images")
    for image in (tmp_path / "images").rglob("*.png"):
        image.unlink()
    moved = replace(config, images=replace(config.images, path=str(images)), train=replace(config.train, steps=6))
    with pytest.raises(InvalidInput, match="images.path: 4 images"), StageContext(moved) as context:
        train(moved, context=context)
