"""Killing a worker and the driver while an autoencoder is trained against a discriminator changes no bit of it.

Nor does it if the newest checkpoint is damaged.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import processes_below
from safetensors.torch import load_file
from tiny import tiny_recipe

from pipelines.checkpoints.folder import CheckpointFolder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "steps": 160, "checkpoint_every": 10, "num_workers": 2, "crop": 12, "adversarial_weight": 0.5,
    "adversarial_start": 20, "perceptual_network": '"efficientnet-lite0"', "validate_every": 80,
}  # fmt: skip

pytestmark = pytest.mark.slow


class AutoencoderFolder:
    """A folder in which the autoencoder job runs."""

    def __init__(self, folder: Path, **settings):
        folder.mkdir()
        self.folder = folder
        overrides = [f"autoencoder.train.{name}={value}" for name, value in (SETTINGS | settings).items()]
        self.recipe = tiny_recipe(folder, *overrides)
        self.result = folder / "output" / "autoencoder"
        self.checkpoints = CheckpointFolder(str(self.result / "training"))

    def start(self) -> subprocess.Popen:
        """Start the job in a process of its own."""
        content = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        script = (
            "import json, sys\n"
            "from pipelines.autoencoder import train_autoencoder\n"
            "from pipelines.config.reader import validate_recipe\n"
            "from pipelines.stage import StageContext\n"
            "config = validate_recipe(json.loads(sys.argv[1]))\n"
            "with StageContext(config) as context:\n"
            "    train_autoencoder(config, context=context)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(content)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=open(self.folder / "log", "a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, step: int, process: subprocess.Popen) -> None:
        """Wait for the checkpoint of this step or a later one."""
        while self.checkpoints.last_step() < step:
            assert process.poll() is None, self.log()
            time.sleep(0.05)

    def finish(self, process: subprocess.Popen) -> None:
        assert process.wait(timeout=900) == 0, self.log()

    def metric(self, name: str) -> dict[int, float]:
        """Return the values of a metric in the store by step."""
        from mlflow import MlflowClient

        client = MlflowClient(self.recipe.tracking.uri)
        (run,) = client.search_runs([client.get_experiment_by_name(self.recipe.name).experiment_id])
        return {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    training = AutoencoderFolder(tmp_path_factory.mktemp("kills") / "unbroken")
    training.finish(training.start())
    return training


def test_a_killed_worker_and_a_killed_driver_change_nothing(tmp_path, unbroken):
    training = AutoencoderFolder(tmp_path / "killed")
    process = training.start()
    training.wait_for(10, process)  # before the discriminator starts
    os.kill(processes_below(process.pid, "RayTrainWorker")[0], signal.SIGKILL)
    training.wait_for(50, process)
    process.kill()
    process.wait()
    newest = training.checkpoints.last_step()
    assert 50 <= newest < 160
    (Path(training.checkpoints.uri_of(newest)) / "ema.safetensors").write_bytes(b"cut")
    training.finish(training.start())
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "report.json", "raydit.json"):
        assert (training.result / name).read_bytes() == (unbroken.result / name).read_bytes(), name
    assert not (training.result / "training").exists()


def test_one_worker_and_two_agree(tmp_path):
    """To rounding, which longer trainings amplify: after 160 steps to 0.1 dB.

    Biases before a norm are left out, because they have no gradient but rounding, which AdamW scales up.
    """
    few = {"steps": 6, "warmup_steps": 0, "adversarial_start": 2, "validate_every": 6, "log_every": 1}
    trainings = [
        AutoencoderFolder(tmp_path / str(number), num_workers=number, learning_rate=1e-3, **few) for number in (1, 2)
    ]
    for training in trainings:
        training.finish(training.start())
    for name in ("loss", "adaptive_weight", "discriminator", "grad_norm", "validation/psnr", "psnr", "ssim"):
        one, two = (training.metric(f"autoencoder/{name}") for training in trainings)
        assert one and one == pytest.approx(two, rel=2e-3), name
    weights, others = (load_file(training.result / "diffusion_pytorch_model.safetensors") for training in trainings)
    for name, weight in weights.items():
        if not name.endswith("bias"):
            assert float((weight - others[name]).norm()) < 2e-3 * float(weight.norm()), name
