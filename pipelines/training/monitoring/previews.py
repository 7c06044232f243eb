"""Previews: grids of samples from the checkpoints of a running training, drawn by Ray tasks."""

import tempfile
import time
from collections.abc import Callable, Iterator
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
PATIENCE_SECONDS = 60.0
"""How long a grid may wait for CPUs and GPUs, and a process, while newer checkpoints replace its own."""


class Previews:
    """Starts a grid for every checkpoint that is due, and logs it to tracking when it is drawn.

    All grids have the same seed and labels, so that the same images are seen to become sharp.
    """

    def __init__(self, config: Recipe, run: RunLog, say: Callable[[str], None]):
        """say: shows a line to the user."""
        self._config, self._run, self._say = config, run, say
        self._folder = Path(storage.local_folder_for(config.folder("samples")))
        self._pending: dict[Any, tuple[int, str]] = {}
        self._waiting: dict[Any, float] = {}
        """Pending grids that nothing draws yet, and since when."""

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
        grid = draw_grid.remote(checkpoint, self._config)
        self._pending[grid], self._waiting[grid] = (step, digest), time.monotonic()

    def collect(self, *, wait: bool = False) -> None:
        """Log the grids that are drawn; with `wait`, wait for those that are not, and in the end give them up."""
        if not self._pending:
            return
        import ray

        deadline = time.monotonic() + (FINAL_WAIT_SECONDS if wait else 0)
        while self._pending:
            answered, _ = ray.wait(list(self._pending), timeout=max(0.0, deadline - time.monotonic()))
            if not answered:
                break
            self._receive(*answered)
        if wait and self._pending:
            steps = ", ".join(f"{step:,}" for step in sorted(self.pending_steps))
            self._say(f"no samples of step {steps} after {FINAL_WAIT_SECONDS:.0f} s: no longer waiting for them")
            self._cancel(*self._pending)

    def cancel_waiting(self) -> None:
        """Give up grids that have waited too long for room on the cluster, but for the newest of those that wait.

        Where training takes all of it, none is drawn before its end, and each would keep its checkpoint from being
        removed.
        """
        now = time.monotonic()
        for grid in list(self._waiting)[:-1]:
            if now - self._waiting[grid] > PATIENCE_SECONDS:
                self._say(
                    f"no samples of step {self._pending[grid][0]:,}: the training's workers leave no room to draw "
                    "them (evaluate.gpus_per_worker, evaluate.cpus_per_worker); only the newest ones wait for its end"
                )
                self._cancel(grid)

    def _receive(self, grid: Any) -> None:
        """Take the next answer of a task: that it has begun to draw, or the grid."""
        import ray

        step, digest = self._pending[grid]
        self._waiting.pop(grid, None)
        try:
            png = ray.get(next(grid))
            if png is None:
                return
            file = self._folder / f"step_{step:07d}.png"
            storage.write_atomically(str(file), png)
            self._run.image(file, SAMPLES, step)
            self._run.artifact(file, SAMPLES)
            self._run.model_picture(digest, f"{SAMPLES}/{file.name}")
        except Exception as error:  # a missing picture must not end the training
            self._say(f"no samples of step {step:,}: {str(error).strip().splitlines()[-1]}")
        del self._pending[grid]

    def _cancel(self, *grids: Any) -> None:
        import ray

        for grid in grids:
            ray.cancel(grid)
            del self._pending[grid]
            self._waiting.pop(grid, None)


def _draw_grid(checkpoint: str, config: Recipe) -> Iterator[bytes | None]:
    """Yield None when drawing begins, and then the grid as a PNG."""
    yield None
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
        yield file.read_bytes()
