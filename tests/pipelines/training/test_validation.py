"""The loss on held-out latents: its value, on any number of workers, beside an unchanged training, and after a stop."""

import hashlib
import threading

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeRun
from tiny_training import Training, assert_equal, settings_of_worker, training_recipe, write_held_out

from dit.autoencoder import sample_posterior
from dit.diffusion import GaussianDiffusion
from dit.objective import create_process
from dit.random import Stream, normal, uniform
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.reader import RecipeError
from pipelines.config.training import VALIDATION_BATCH
from pipelines.train import start_monitor, train
from pipelines.training.cursor import DataCursor
from pipelines.training.group.messages import Notice, Validated
from pipelines.training.group.worker import Worker
from pipelines.training.loop import create_training_state
from pipelines.training.monitoring.retention import check_keep_best
from pipelines.training.validation import Validation, held_out_batches
from raydit.errors import InvalidInput, NotFound

HELD_OUT = 2 * VALIDATION_BATCH + 13


class Group:
    """Workers in threads of this process, which gather as processes do."""

    class Member(Worker):
        def __init__(self, group, rank):
            super().__init__(rank, len(group.values), torch.device("cpu"), lambda message: None)
            self.group = group

        def gather(self, value):
            self.group.values[self.rank] = value
            self.group.barrier.wait()
            gathered = list(self.group.values)
            self.group.barrier.wait()
            return gathered

    def __init__(self, num_workers):
        self.values, self.barrier = [None] * num_workers, threading.Barrier(num_workers)

    def run(self, function):
        """Call function(worker) in each worker, and return the results by rank."""
        results = [None] * len(self.values)

        def call(rank):
            results[rank] = function(self.Member(self, rank))

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def recipe(tmp_path):
    recipe = training_recipe(tmp_path / "run", validate_every=3)
    write_held_out(recipe, HELD_OUT)
    return recipe


def prepare(recipe, worker=None):
    """Return settings, and a state whose weights are neither zero nor those of its average."""
    settings = settings_of_worker(recipe)
    state = create_training_state(settings, worker or Worker(0, 1, torch.device("cpu"), lambda message: None))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    state.ema.update(state.network, 0)
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return settings, state


def plain_losses(settings, network):
    """Image by image: what the loss is by its definition, with its timesteps."""
    process, dataset = create_process(**settings.objective), settings.held_out.open()
    losses, times = [], []
    keys = dataset.keys(np.arange(len(dataset)))
    for row, key in enumerate(keys):
        position = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        draw, noise = (
            normal(settings.seed, stream, 0, position, dataset.latent_shape)[None]
            for stream in (Stream.VALIDATION_POSTERIOR_NOISE, Stream.VALIDATION_NOISE)
        )
        t = process.sample_timesteps(uniform(settings.seed, Stream.VALIDATION_TIMESTEP, 0, position, (1,)))
        latents = settings.scale.scale(sample_posterior(torch.from_numpy(dataset.arrays.moments[[row]]), draw))
        labels = torch.from_numpy(dataset.arrays.labels[[row]])
        with torch.no_grad():
            losses.append(float(process.training_losses(network, latents, t, labels, noise)["loss"]))
        times.append(float(t) / (process.num_timesteps if isinstance(process, GaussianDiffusion) else 1))
    return np.array(losses), np.array(times)


@pytest.mark.parametrize("objective", ["flow", "diffusion"])
def test_the_loss_is_the_trainings_at_noise_and_timesteps_of_the_keys(tmp_path, objective):
    recipe = training_recipe(tmp_path, validate_every=3, objective=objective)
    write_held_out(recipe, 30)
    settings, state = prepare(recipe)
    process = create_process(**settings.objective)
    worker = Worker(0, 1, torch.device("cpu"), lambda message: None)
    found = Validation(settings, process, worker, lambda step, metrics: None).measure(state)
    for prefix, network in (("raw_", state.network), ("", averaged_network(settings, state))):
        losses, times = plain_losses(settings, network)
        assert found[f"{prefix}loss"] == pytest.approx(losses.mean(), rel=1e-5)
        for quarter in range(4):
            inside = (times * 4 >= quarter) & (times * 4 < quarter + 1)
            assert found[f"{prefix}loss_quartile_{quarter + 1}"] == pytest.approx(losses[inside].mean(), rel=1e-5)
    assert found["loss"] != found["raw_loss"] and len(found) == 10


def averaged_network(settings, state):
    """A second network, with the averaged weights."""
    network = create_training_state(settings, Worker(0, 1, torch.device("cpu"), lambda message: None)).network
    state.ema.copy_to(network)
    return network


@pytest.mark.parametrize("num_images", [1, VALIDATION_BATCH - 1, VALIDATION_BATCH, HELD_OUT])
def test_batches_have_one_size_and_every_image_in_order(num_images):
    batches = held_out_batches(num_images)
    assert {len(rows) for rows in batches} == {min(VALIDATION_BATCH, num_images)}
    np.testing.assert_array_equal(np.concatenate(batches)[:num_images], np.arange(num_images))


def test_the_loss_is_the_same_to_the_bit_on_any_number_of_workers(recipe):
    prepared = [prepare(recipe) for _ in range(4)]  # here, because threads share torch's generator of weights

    def measure(worker):
        settings, state = prepared[worker.rank]
        return Validation(settings, create_process(**settings.objective), worker, print).measure(state)

    (expected,) = Group(1).run(measure)
    assert expected["loss"] > 0
    for num_workers in (2, 3, 4):
        assert Group(num_workers).run(measure) == [expected] * num_workers


def test_training_is_not_touched_by_validation_and_resumes_to_the_bit(tmp_path):
    plain = Training(training_recipe(tmp_path / "plain")).run()

    def with_validation(name, stops):
        settings = {"validate_every": 1, "log_every": 3}
        recipe = training_recipe(tmp_path / name, **settings)
        write_held_out(recipe, 10)
        runs = [Training(recipe).run(stop) for stop in (*stops, None)]
        return recipe, {m.step: m.metrics for run in runs for m in run.messages if isinstance(m, Validated)}

    whole, losses = with_validation("whole", [])
    parts, losses_of_parts = with_validation("parts", [4, 1])
    assert list(losses) == list(range(1, 9)) and losses_of_parts == losses
    for recipe in (whole, parts):
        assert_equal(Training(recipe).weights, plain.weights)
        cursors = [DataCursor.of(CheckpointFolder(recipe.folder("checkpoints")).open(step)) for step in (3, 6, 8)]
        assert [[each.step for each in cursor.validations] for cursor in cursors] == [[1, 2, 3], [4, 5, 6], [7, 8]]
        assert cursors[1].validation_at(6) == losses[6] and cursors[1].validation_at(7) == {}


def test_losses_are_curves_and_keep_the_best_checkpoint(tmp_path):
    """The best one is an early one, because the learning rate makes the training diverge."""
    keep = {"keep_last": 1, "keep_best": "validation/loss"}
    recipe = training_recipe(tmp_path, validate_every=1, checkpoint_every=1, learning_rate=0.5, **keep)
    write_held_out(recipe, 10)
    training = Training(recipe).run()
    losses = {m.step: m.metrics["loss"] for m in training.messages if isinstance(m, Validated)}
    best = min(losses, key=losses.get)
    assert best < 8
    run, checkpoints = FakeRun(), CheckpointFolder(recipe.folder("checkpoints"))
    monitor = start_monitor(recipe, FakeContext(), run, checkpoints, 0)
    for message in training.messages:
        if not isinstance(message, Notice) and hasattr(message, "step"):
            monitor.on_message(message)
    monitor._remove_outdated(force_refresh=True)
    assert checkpoints.finished_steps() == [best, 8]
    assert run.values("validation/loss") == losses and len(run.values("validation/raw_loss_quartile_2")) > 0
    assert any(str(file).endswith("validation_loss.png") for file, _ in run.files)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validate_every": 2}, "train.validate_every: found 2, expected a divisor of checkpoint_every = 3"),
        (
            {"keep_best": "validation/loss", "keep_last": 1},
            "train.keep_best: found 'validation/loss' without",
        ),
    ],
)
def test_contradicting_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(RecipeError) as error:
        training_recipe(tmp_path, **settings)
    assert message in str(error.value)


def test_an_unknown_validation_loss_is_refused():
    for known in ("validation/loss", "validation/raw_loss", "validation/loss_quartile_4", "fid_50k"):
        check_keep_best(known)
    with pytest.raises(InvalidInput, match="train.keep_best: found 'validation/mse', expected validation/loss"):
        check_keep_best("validation/mse")


def test_a_training_without_held_out_latents_is_refused_before_any_work(tmp_path):
    recipe = training_recipe(tmp_path, validate_every=3)
    with pytest.raises(NotFound, match="latents_held_out"):
        train(recipe, context=FakeContext())
