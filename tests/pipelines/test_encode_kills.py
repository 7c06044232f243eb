"""Encode jobs whose driver, actor, raylet or node is killed end with the files of an unbroken run, byte for byte."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import processes_below
from tiny import write_images
from tiny_encode import autoencoder_folder

from pipelines.latents.dataset import LatentDataset
from pipelines.latents.verify import verify

ROOT = Path(__file__).resolve().parents[2]
PER_CLASS = 80
SHARDS = 61
RECIPE = """
name = "kills"
output = "output"
images = {path = "images", size = 16}
autoencoder = {id = "pretrained"}
encode = {shard_rows = 4, batch_size = 4, num_workers = 2}
model = {patch_size = 2, hidden_size = 32, depth = 2, num_heads = 2}
objective = {kind = "flow"}
evaluate = {sampler = "euler"}
"""

pytestmark = pytest.mark.slow


@dataclass
class Workspace:
    """A folder in which the command runs; all of its paths are relative, so that workspaces can be compared."""

    folder: Path

    @property
    def latents(self) -> Path:
        return self.folder / "output" / "latents"

    def finished(self) -> int:
        return len(list((self.latents / ".records").glob("*.json")))

    def start(self, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "encode", "recipe.toml", *flags],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=open(self.folder / "log", "w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, shards: int, process: subprocess.Popen) -> None:
        """Wait until this number of shards is finished."""
        while self.finished() < shards and not (self.latents / "manifest.json").exists():
            assert process.poll() is None, self.log()
            time.sleep(0.005)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self, process: subprocess.Popen) -> None:
        assert process.wait(timeout=600) == 0, self.log()

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.latents.rglob("*") if path.is_file()}


def make_workspace(folder: Path) -> Workspace:
    write_images(folder / "images", per_class=PER_CLASS)
    autoencoder_folder(folder / "pretrained")
    (folder / "recipe.toml").write_text(RECIPE)
    return Workspace(folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    workspace = make_workspace(tmp_path_factory.mktemp("unbroken"))
    workspace.finish(workspace.start())
    dataset = LatentDataset.open(workspace.latents)
    assert len(dataset) == 3 * PER_CLASS and len(dataset.shards) == SHARDS
    assert all(check.ok for check in verify(dataset, sample=8) if check.name != "images")
    return workspace.content()


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return make_workspace(tmp_path / "workspace")


def test_a_driver_killed_at_ten_random_points_leaves_the_files_of_an_unbroken_run(workspace, unbroken):
    points = random.Random(4)
    for _ in range(10):
        process = workspace.start()
        workspace.wait_for(workspace.finished() + points.randrange(0, 8), process)
        time.sleep(points.random() * 0.1)
        process.kill()
        process.wait()
        assert not (workspace.latents / "manifest.json").exists(), "killed too late"
    workspace.finish(workspace.start())
    assert workspace.content() == unbroken


def test_a_killed_actor_changes_no_file(workspace, unbroken):
    process = workspace.start()
    for shards in (6, 25):
        workspace.wait_for(shards, process)
        (victim, *_) = processes_below(process.pid, "EncodeImages")
        os.kill(victim, signal.SIGKILL)
    workspace.finish(process)
    assert workspace.content() == unbroken


def test_the_same_command_resumes_after_a_killed_raylet(workspace, unbroken):
    process = workspace.start()
    workspace.wait_for(10, process)
    (raylet,) = processes_below(process.pid, "raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    assert process.wait(timeout=300) != 0, workspace.log()
    workspace.finish(workspace.start())
    assert workspace.content() == unbroken


def test_a_lost_node_changes_no_file(workspace, unbroken, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=3)
        process = workspace.start("--address", cluster.address)
        workspace.wait_for(12, process)
        cluster.remove_node(node, allow_graceful=False)
        workspace.finish(process)
    finally:
        cluster.shutdown()
    assert workspace.content() == unbroken


def test_growth_killed_at_random_points_leaves_the_files_of_an_unbroken_one(workspace, unbroken, tmp_path):
    workspace.finish(workspace.start())
    for index in range(40):
        shutil.copy(
            workspace.folder / "images" / "ring" / f"{index:03d}.png",
            workspace.folder / "images" / "blob" / f"{index:03d}x.png",
        )
    shutil.copytree(workspace.folder, tmp_path / "other")
    other = Workspace(tmp_path / "other")
    other.finish(other.start())
    points = random.Random(5)
    for _ in range(2):
        process = workspace.start()
        workspace.wait_for(workspace.finished() + 1 + points.randrange(0, 3), process)
        process.kill()
        process.wait()
        assert len(LatentDataset.open(workspace.latents)) == 3 * PER_CLASS
    workspace.finish(workspace.start())
    assert workspace.content() == other.content() != unbroken
