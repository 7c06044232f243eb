"""Previews: grids of samples from the checkpoints of a running training, drawn by Ray tasks."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import storage
from pipelines.config.recipe import Recipe
from pipelines.tracking.experiment_page import SAMPLES
from pipelines.tracking.run_log import RunLog

GRID_COLUMNS = 8
"""Samples of each class."""
FINAL_WAIT_SECONDS = 600.0
"""How long the end of training waits for the last grids."""


class Previews:
    """Starts a grid for every checkpoint that is due, and logs it to tracking when it is drawn.

    All grids have the same seed and labels, so that the same images are seen to become sharp.
    """

    def __init__(self, config: Recipe, run: RunLog, say: Callable[[str], None]):
        """say: shows a line to the user."""
        self._config, self._run, self._say = config, run, say
        self._folder = Path(storage.local_folder_for(config.folder("samples")))
        self._pending: dict[Any, tuple[int, str]] = {}

    @property
    def pending_steps(self) -> set[int]:
        """Steps whose checkpoints are still being read."""
        return {step for step, _ in self._pending.values()}

    def is_due(self, step: int) -> bool:
        """Return whether the recipe asks for a grid at a step."""
        every = self._config.train.sample_every
        return every > 0 and step > 0 and step % every == 0

    def start(self, checkpoint: str, step: int, digest: str) -> None:
        """Start the grid of a checkpoint, given by path or URI.

        digest: of the checkpoint, whose LoggedModel shows the grid.
        """
        import ray

        evaluate = self._config.evaluate
        resources = {"num_cpus": evaluate.cpus_per_worker, "num_gpus": evaluate.gpus_per_worker, **evaluate.placement}
        draw_grid = ray.remote(**resources, max_retries=1)(_draw_grid)
        self._pending[draw_grid.remote(checkpoint, self._config)] = step, digest

    def collect(self, *, wait: bool = False) -> None:
        """Log the grids that are drawn; with `wait`, wait for those that are not."""
        if not self._pending:
            return
        import ray

        timeout = FINAL_WAIT_SECONDS if wait else 0
        finished, late = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=timeout)
        for reference in finished:
            step, digest = self._pending.pop(reference)
            try:
                file = self._folder / f"step_{step:07d}.png"
                storage.write_atomically(str(file), ray.get(reference))
                self._run.image(file, SAMPLES, step)
                self._run.artifact(file, SAMPLES)
                self._run.model_picture(digest, f"{SAMPLES}/{file.name}")
            except Exception as error:  # a missing picture must not end the training
                self._say(f"no samples of step {step:,}: {str(error).strip().splitlines()[-1]}")
        if wait and late:
            steps = ", ".join(f"{self._pending[reference][0]:,}" for reference in late)
            self._say(f"no samples of step {steps} after {FINAL_WAIT_SECONDS:.0f} s: no longer waiting for them")


def _draw_grid(checkpoint: str, config: Recipe) -> bytes:
    """Return the grid as a PNG."""
    import torch

    from pipelines.scoring.sample_grid import sample_grid

    torch.set_num_threads(config.evaluate.cpus_per_worker)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grid.png"
        sample_grid(
            checkpoint,
            config.evaluate,
            config.seed,
            str(file),
            classes=None,
            columns=GRID_COLUMNS,
            random=config.random,
        )
        return file.read_bytes()
