"""A folder with finished latents, in which the train job runs in a process of its own that tests can kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_training import training_recipe, write_held_out

from pipelines.checkpoints.folder import CheckpointFolder

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 1200, 20
MODEL = {"patch_size": 1, "hidden_size": 96, "depth": 6, "num_heads": 4}
"""Large enough for some seconds of training, in which processes can be killed."""


class TrainingFolder:
    """A folder with finished latents, in which the train job runs."""

    def __init__(self, folder: Path, random: str | None = "counter", model: dict | None = None, **train):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        settings = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 5, "num_workers": 2, **train}
        # Half of the validations are between checkpoints.
        self.recipe = training_recipe(
            folder, model=model or MODEL, random=random, validate_every=EVERY // 2, **settings
        )
        if not (folder / "output" / "latents_held_out").exists():
            write_held_out(self.recipe, 20)
        self.checkpoints = CheckpointFolder(self.recipe.folder("checkpoints"))

    def start(self, address: str = "", before: str = "") -> subprocess.Popen:
        """Start the train job in a process of its own. before: code that runs first in it."""
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
        """Wait for the checkpoint of this step or a later one."""
        while self.newest() < step:
            assert process.poll() is None, self.log()
            time.sleep(0.01)

    def newest(self) -> int:
        return self.checkpoints.last_step()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self, process: subprocess.Popen) -> None:
        assert process.wait(timeout=600) == 0, self.log()

    def models(self) -> list[int]:
        """Return the steps of the checkpoints that the store has as models."""
        from mlflow import MlflowClient

        client = MlflowClient(self.recipe.tracking.uri)
        experiment = client.get_experiment_by_name(self.recipe.name)
        names = [model.name for model in client.search_logged_models([experiment.experiment_id])]
        return [int(name.rpartition("_")[2]) for name in names]

    def losses(self, rel: float = 0.0, metric: str = "train/loss") -> dict[int, float]:
        """Return the losses in the store by step; several values of one step must agree within `rel`."""
        from mlflow import MlflowClient

        client = MlflowClient(self.recipe.tracking.uri)
        experiment = client.get_experiment_by_name(self.recipe.name)
        losses: dict[int, set[float]] = {}
        for run in client.search_runs([experiment.experiment_id]):
            for point in client.get_metric_history(run.info.run_id, metric):
                losses.setdefault(point.step, set()).add(point.value)
        assert all(max(values) - min(values) <= rel * max(values) for values in losses.values()), losses
        return {step: max(values) for step, values in sorted(losses.items())}
