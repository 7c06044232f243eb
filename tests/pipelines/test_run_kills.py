"""A run that was killed or interrupted and run again ends as an uninterrupted one."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_command import is_tidy, start


def wait_for(path: Path, pattern: str, process: subprocess.Popen) -> None:
    """Wait for a file that shows how far the command has come."""
    while not any(path.glob(pattern)):
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, bytes]:
    checkpoint = folder / "output" / "checkpoints" / "step_0000006"
    return {file.name: file.read_bytes() for file in checkpoint.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("cut", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_in_every_stage_gives_the_same_result(finished, tmp_path, cut):
    unbroken, _ = finished
    folder = tmp_path / "cut"
    folder.mkdir()
    milestones = [
        ("output/autoencoder", "training/step_0000002/COMPLETE"),
        ("output/latents", "part-*.parquet"),
        ("output/checkpoints", "step_0000002/COMPLETE"),
        ("output/evaluations", "*/*/shards-*/shard-00000.npz"),
    ]
    for folder_name, pattern in milestones:
        process = start(folder)
        wait_for(folder / folder_name, pattern, process)
        process.send_signal(cut)
        output, _ = process.communicate()
        assert process.returncode == (-cut if cut == signal.SIGKILL else 128 + cut), output
        assert cut == signal.SIGKILL or is_tidy(folder, output), output
    process = start(folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert weights(folder) == weights(unbroken)
    (report,) = (folder / "output" / "evaluations").glob("*/*/report.json")
    (expected,) = (unbroken / "output" / "evaluations").glob("*/*/report.json")
    # Features are equal to the bit; a distance between singular covariances depends in its last digits on how many
    # threads the process that scores gives to its matrix products.
    assert metrics(report) == pytest.approx(metrics(expected), rel=1e-9)


def metrics(report: Path) -> dict[str, float]:
    from evaluation.report import EvaluationReport

    return EvaluationReport.from_json(report.read_text()).metrics
