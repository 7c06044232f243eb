"""Killing workers, driver, raylet or a node during training changes no bit of the result."""

import os
import random
import re
import signal
import time

import pytest
from processes import processes_below
from tiny_training import assert_equal, final_weights
from training_folder import EVERY, STEPS, TrainingFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return finished_unbroken(TrainingFolder(tmp_path_factory.mktemp("unbroken")))


def finished_unbroken(training):
    """Return the weights, the losses and the validation losses of a training that nothing cuts off."""
    training.finish(training.start())
    return final_weights(training.recipe), training.losses(), training.losses(metric="validation/loss")


def assert_unbroken(training, unbroken):
    weights, losses, validation = unbroken
    assert_equal(final_weights(training.recipe), weights)
    assert training.losses() == losses
    assert list(validation) == list(range(EVERY // 2, STEPS + 1, EVERY // 2))
    assert training.losses(metric="validation/loss") == validation


def test_killed_drivers_and_workers_at_ten_random_points_change_nothing(tmp_path, unbroken):
    """The running command replaces a worker; a killed driver's command is run again."""
    training, points = TrainingFolder(tmp_path), random.Random(2)
    process = training.start()
    for victim in ["worker", "driver"] * 5:
        training.wait_for(training.newest() + 1, process)
        time.sleep(points.random() * 0.3)
        if victim == "driver":
            process.kill()
            process.wait()
            process = training.start()
        else:
            # Those of a killed driver may have written the checkpoint that was waited for.
            while not (workers := processes_below(process.pid, "RayTrainWorker")):
                assert process.poll() is None, training.log()
                time.sleep(0.1)
            os.kill(points.choice(workers), signal.SIGKILL)
    training.finish(process)
    assert_unbroken(training, unbroken)


def test_ctrl_c_and_a_killed_raylet_change_nothing(tmp_path, unbroken):
    training = TrainingFolder(tmp_path)
    process = training.start()
    training.wait_for(EVERY, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    process = training.start()
    training.wait_for(training.newest() + 1, process)
    (raylet,) = processes_below(process.pid, "raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    assert process.wait(timeout=300) != 0, training.log()
    training.finish(training.start())
    assert_unbroken(training, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_loses_no_step(tmp_path, unbroken, number):
    """Two workers stop after the same step, between two regular checkpoints, and go on from there to the bit."""
    training = TrainingFolder(tmp_path, checkpoint_every=500)
    for stops in (1, 2):
        process = training.start()
        while training.log().count("steps | loss") < stops:
            assert process.poll() is None, training.log()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=120) != 0
        (step,) = training.checkpoints.interrupted_steps()
        assert f"stopped after step {step}" in training.log().replace(",", "")
        assert set(training.models()) == set(training.checkpoints.finished_steps())
    training.finish(training.start())
    assert training.checkpoints.interrupted_steps() == [] and training.checkpoints.finished_steps()[-1] == STEPS
    assert_unbroken(training, unbroken)


def test_lost_messages_are_logged_by_the_next_run(tmp_path, unbroken):
    """The mailbox dies: the workers finish, the command fails, and the next one logs the missing reports."""
    training = TrainingFolder(tmp_path)
    process = training.start()
    training.wait_for(EVERY, process)
    (mailbox,) = processes_below(process.pid, "ray::Mailbox")
    os.kill(mailbox, signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    assert "reports did not reach tracking" in training.log()
    training.finish(training.start())
    assert_unbroken(training, unbroken)


def test_a_lost_node_changes_nothing(tmp_path, unbroken, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        training = TrainingFolder(tmp_path)
        process = training.start(cluster.address)
        training.wait_for(2 * EVERY, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        training.finish(process)
    finally:
        cluster.shutdown()
    assert_unbroken(training, unbroken)


def test_training_continues_with_fewer_workers_and_grows_again(tmp_path, monkeypatch):
    """Every step sees the same images, whatever the number of workers, so that results agree to rounding.

    With draws by generators: of some seeds and draws, this model amplifies rounding from 1e-7 to 1e-2 in 300 steps, and
    these are others.
    """
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        elastic = {"num_workers": [1, 2], "steps": 3 * STEPS, "checkpoint_every": 100, "keep_last": 2}
        training = TrainingFolder(tmp_path / "elastic", random=None, **elastic)
        often = (
            "import pipelines.training.group.run_workers\npipelines.training.group.run_workers.RESIZE_SECONDS = 2.0\n"
        )
        process = training.start(cluster.address, before=often)
        training.wait_for(100, process)
        cluster.remove_node(node, allow_graceful=False)
        training.wait_for(training.newest() + 300, process)
        cluster.add_node(num_cpus=1)
        training.finish(process)
    finally:
        cluster.shutdown()
    numbers = re.findall(r"(\d+) of at most 2 workers", training.log())
    assert training.newest() == 3 * STEPS
    assert numbers[0] == numbers[-1] == "2" and "1" in numbers, training.log()
    losses = {step: loss for step, loss in training.losses(rel=1e-5).items() if step <= STEPS}
    _, expected, _ = finished_unbroken(TrainingFolder(tmp_path / "unbroken", random=None))
    assert losses == pytest.approx(expected, rel=1e-5)
