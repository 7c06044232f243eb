"""Kill -9 of worker, driver, raylet and node in the middle of training; the end is the unbroken run's, to the bit."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import processes_below
from tiny_training import assert_equal, final_weights, training_recipe

from pipelines.checkpoints.folder import CheckpointFolder

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 1200, 20
MODEL = {"patch_size": 1, "hidden_size": 96, "depth": 6, "num_heads": 4}
"""Large enough for some seconds of training, in which there is time to kill."""

pytestmark = pytest.mark.slow


class Place:
    """A folder with finished latents in which the train command runs."""

    def __init__(self, folder: Path, **train):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        settings = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 5, "num_workers": 2, **train}
        self.recipe = training_recipe(folder, model=MODEL, **settings)
        self.checkpoints = CheckpointFolder(self.recipe.folder("checkpoints"))

    def start(self, address: str = "", before: str = "") -> subprocess.Popen:
        """The command in a process of its own; before: code that runs first in it."""
        content = {name: value for name, value in dataclasses.asdict(self.recipe).items() if name != "encode"}
        script = before + (
            "import json, sys\n"
            "from pipelines.config.reader import validate_recipe\n"
            "from pipelines.stage import StageContext\n"
            "from pipelines.train import train\n"
            "config = validate_recipe(json.loads(sys.argv[1]))\n"
            "with StageContext(config, address=sys.argv[2] or None) as context:\n"
            "    train(config, context=context)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(content), address],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=open(self.folder / "log", "a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def wait_for(self, step: int, process: subprocess.Popen) -> None:
        """Until a checkpoint of this step or a later one is there."""
        while self.newest() < step:
            assert process.poll() is None, self.log()
            time.sleep(0.01)

    def newest(self) -> int:
        return self.checkpoints.last_step()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self, process: subprocess.Popen) -> None:
        assert process.wait(timeout=600) == 0, self.log()

    def losses(self, rel: float = 0.0) -> dict[int, float]:
        """The losses in the store, by step: the same step twice must be the same number, or as near as `rel` says."""
        from mlflow import MlflowClient

        client = MlflowClient(self.recipe.tracking.uri)
        experiment = client.get_experiment_by_name(self.recipe.name)
        losses: dict[int, set[float]] = {}
        for run in client.search_runs([experiment.experiment_id]):
            for point in client.get_metric_history(run.info.run_id, "train/loss"):
                losses.setdefault(point.step, set()).add(point.value)
        assert all(max(values) - min(values) <= rel * max(values) for values in losses.values()), losses
        return {step: max(values) for step, values in sorted(losses.items())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("unbroken"))
    place.finish(place.start())
    return final_weights(place.recipe), place.losses()


def assert_unbroken(place, unbroken):
    weights, losses = unbroken
    assert_equal(final_weights(place.recipe), weights)
    assert place.losses() == losses


def test_killed_drivers_and_workers_at_ten_random_points_change_nothing(tmp_path, unbroken):
    """A worker is replaced by the running command; after a driver the command is given again."""
    place, points = Place(tmp_path), random.Random(2)
    process = place.start()
    for victim in ["worker", "driver"] * 5:
        place.wait_for(place.newest() + 1, process)
        time.sleep(points.random() * 0.3)
        if victim == "driver":
            process.kill()
            process.wait()
            process = place.start()
        else:
            # Those of a killed driver may have written the checkpoint that was waited for.
            while not (workers := processes_below(process.pid, "RayTrainWorker")):
                assert process.poll() is None, place.log()
                time.sleep(0.1)
            os.kill(points.choice(workers), signal.SIGKILL)
    place.finish(process)
    assert_unbroken(place, unbroken)


def test_ctrl_c_and_a_killed_raylet_change_nothing(tmp_path, unbroken):
    place = Place(tmp_path)
    process = place.start()
    place.wait_for(EVERY, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    process = place.start()
    place.wait_for(place.newest() + 1, process)
    (raylet,) = processes_below(process.pid, "raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    assert process.wait(timeout=300) != 0, place.log()
    place.finish(place.start())
    assert_unbroken(place, unbroken)


def test_lost_messages_are_told_by_the_same_command(tmp_path, unbroken):
    """The actor that workers tell their losses dies: they train on, the command fails, and the next one tells all."""
    place = Place(tmp_path)
    process = place.start()
    place.wait_for(EVERY, process)
    (mailbox,) = processes_below(process.pid, "ray::Mailbox")
    os.kill(mailbox, signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    assert "reports did not reach tracking" in place.log()
    place.finish(place.start())
    assert_unbroken(place, unbroken)


def test_a_lost_node_changes_nothing(tmp_path, unbroken, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        place = Place(tmp_path)
        process = place.start(cluster.address)
        place.wait_for(2 * EVERY, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        place.finish(process)
    finally:
        cluster.shutdown()
    assert_unbroken(place, unbroken)


def test_training_goes_on_with_the_workers_that_are_left_and_grows_again(tmp_path, unbroken, monkeypatch):
    """The same images in every step, whatever the number of workers: the result agrees to rounding."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        place = Place(tmp_path, num_workers=[1, 2], steps=3 * STEPS, checkpoint_every=100, keep_last=2)
        often = "import pipelines.training.group\npipelines.training.group.RESIZE_SECONDS = 2.0\n"
        process = place.start(cluster.address, before=often)
        place.wait_for(100, process)
        cluster.remove_node(node, allow_graceful=False)
        place.wait_for(place.newest() + 300, process)
        cluster.add_node(num_cpus=1)
        place.finish(process)
    finally:
        cluster.shutdown()
    numbers = re.findall(r"(\d+) of at most 2 workers", place.log())
    assert place.newest() == 3 * STEPS
    assert numbers[0] == numbers[-1] == "2" and "1" in numbers, place.log()
    losses = {step: loss for step, loss in place.losses(rel=1e-5).items() if step <= STEPS}
    assert losses == pytest.approx(unbroken[1], rel=1e-5)
