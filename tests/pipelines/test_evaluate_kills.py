"""An evaluation whose command or workers are killed gives the same numbers, of the same images, when it is resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import processes_below
from tiny_checkpoint import tiny_output, write_checkpoint

from evaluation.report import EvaluationReport

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("evaluate.num_samples=60", "evaluate.shard_rows=4", "evaluate.batch_size=4", "evaluate.sampling_steps=20")


def start(folder, *command):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(folder, pattern, process, count=1):
    """Wait until `count` files match; several workers finish shards in any order."""
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def metrics(folder):
    (report,) = (folder / "output" / "evaluations").glob("*/*/report.json")
    return EvaluationReport.from_json(report.read_text()).metrics


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A folder with an evaluation by one worker that was not interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    checkpoint = write_checkpoint(tiny_output(folder, *SETTINGS), 2)
    finish(start(folder, "evaluate", str(checkpoint.path)))
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_a_command_that_is_killed_repeatedly_resumes_with_the_missing_shards(unbroken, tmp_path, workers):
    config = tiny_output(tmp_path, *SETTINGS, f"evaluate.num_workers={workers}")
    command = ("evaluate", str(write_checkpoint(config, 2).path))
    for pattern, count in (("references/*.shards-4/*.npz", 2), ("evaluations/*/*/shards-*/*.npz", 4)):
        process = start(tmp_path, *command)
        wait_for(tmp_path / "output", pattern, process, count)
        process.kill()
        process.communicate()
    finished = len(list((tmp_path / "output").glob("evaluations/*/*/shards-*/*.npz")))
    output = finish(start(tmp_path, *command))
    counts = [int(count) for count in re.findall(r"(\d+)/\d+ images", output)]
    assert finished >= 4 and min(counts) >= 4 * finished  # progress starts at the finished shards
    assert metrics(tmp_path) == metrics(unbroken)


def test_a_worker_that_dies_is_replaced_and_nothing_is_counted_twice(unbroken, tmp_path):
    config = tiny_output(tmp_path, *SETTINGS, "evaluate.num_workers=2")
    process = start(tmp_path, "evaluate", str(write_checkpoint(config, 2).path))
    wait_for(tmp_path / "output", "evaluations/*/*/shards-*/shard-00001.npz", process)
    os.kill(processes_below(process.pid, "PoolWorker")[0], signal.SIGKILL)
    assert "a worker died" in finish(process)
    assert metrics(tmp_path) == metrics(unbroken)


def test_workers_that_keep_dying_end_the_command_with_one_line(tmp_path):
    config = tiny_output(tmp_path, *SETTINGS)
    process = start(tmp_path, "evaluate", str(write_checkpoint(config, 2).path), "--num-samples", "4000")
    wait_for(tmp_path / "output", "evaluations/*/*/shards-*/*.npz", process)
    while process.poll() is None:
        for worker in processes_below(process.pid, "PoolWorker"):
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.02)
    output = process.stdout.read()
    assert process.returncode == 1 and "Traceback" not in output
    assert "raydit: workers died again and again" in output.splitlines()[-1]


def test_a_lost_node_loses_no_shard(unbroken, tmp_path, monkeypatch):
    """Of two workers on a node each, one is lost for good; the other computes the rest."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny_output(tmp_path, *SETTINGS, "evaluate.num_workers=2")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        checkpoint = str(write_checkpoint(config, 2).path)
        process = start(tmp_path, "evaluate", checkpoint, "--address", cluster.address)
        wait_for(tmp_path / "output", "evaluations/*/*/shards-*/*.npz", process, 3)
        cluster.remove_node(node, allow_graceful=False)
        finish(process)
    finally:
        cluster.shutdown()
    assert metrics(tmp_path) == metrics(unbroken)


def test_the_same_command_resumes_after_a_killed_raylet(unbroken, tmp_path):
    """The first command may succeed, if all work was done when the raylet died."""
    command = ("evaluate", str(write_checkpoint(tiny_output(tmp_path, *SETTINGS), 2).path))
    process = start(tmp_path, *command)
    wait_for(tmp_path / "output", "evaluations/*/*/shards-*/*.npz", process, 3)
    (raylet,) = processes_below(process.pid, "raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    process.communicate(timeout=300)
    finish(start(tmp_path, *command))
    assert metrics(tmp_path) == metrics(unbroken)


def test_an_interrupted_reference_is_resumed_with_the_same_statistics(tmp_path):
    config = tiny_output(tmp_path)
    flags = ("--size", "16", "--extractor", "efficientnet-lite0", "--set", "evaluate.shard_rows=2")
    command = ("reference", "build", config.images.path, *flags)
    finish(start(tmp_path, *command, "--out", "whole.npz"))
    process = start(tmp_path, *command, "--out", "cut.npz")
    wait_for(tmp_path, "cut.npz.*.shards/shard-00003.npz", process)
    process.kill()
    process.communicate()
    finish(start(tmp_path, *command, "--out", "cut.npz"))
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "cut.npz") as cut:
        assert whole.files == cut.files and all(np.array_equal(whole[name], cut[name]) for name in whole.files)
    assert not list(tmp_path.glob("*.shards"))
