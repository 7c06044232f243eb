"""Grids of samples from the checkpoints of a training that goes on, drawn by Ray tasks of their own."""

import tempfile
from pathlib import Path

from cluster import storage
from pipelines.config.recipe import Recipe
from pipelines.stage import StageContext

COLUMNS = 8
PATIENCE_SECONDS = 600.0


class Previews:
    """Starts a grid for every checkpoint that is due, and hands it to tracking when it is there.

    Seed and labels are the same in all of them, so that one sees the same images become sharp.
    """

    def __init__(self, context: StageContext, config: Recipe, run):
        self._context, self._config, self._run = context, config, run
        self._folder = Path(storage.on_this_machine(config.folder("samples")))
        self._pending: dict = {}

    @property
    def pending_steps(self) -> set[int]:
        """Steps whose checkpoints are still read."""
        return set(self._pending.values())

    def start(self, checkpoint: str, step: int) -> None:
        """Begin the grid of a checkpoint, if the recipe asks for one at its step."""
        every = self._config.train.sample_every
        if not every or step % every:
            return
        import ray

        evaluate = self._config.evaluate
        resources = {"num_cpus": evaluate.cpus_per_worker, "num_gpus": evaluate.gpus_per_worker, **evaluate.placement}
        draw = ray.remote(**resources, max_retries=1)(_draw)
        self._pending[draw.remote(checkpoint, self._config)] = step

    def collect(self, *, wait: bool = False) -> None:
        """Hand over what is there; with `wait`, all that was begun."""
        if not self._pending:
            return
        import ray

        patience = PATIENCE_SECONDS if wait else 0
        finished, late = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=patience)
        for reference in finished:
            step = self._pending.pop(reference)
            try:
                file = self._folder / f"step_{step:07d}.png"
                storage.write_atomically(str(file), ray.get(reference))
                self._run.image(file, "samples", step)
            except Exception as error:  # training is worth more than a picture of it
                self._context.say("train", f"no samples of step {step:,}: {str(error).strip().splitlines()[-1]}")
        if wait and late:
            steps = ", ".join(f"{self._pending[reference]:,}" for reference in late)
            self._context.say(
                "train", f"no samples of step {steps} after {PATIENCE_SECONDS:.0f} s: not waiting for them"
            )


def _draw(checkpoint: str, config: Recipe) -> bytes:
    """The grid as a PNG."""
    import torch

    from pipelines.checkpoints.stored import open_checkpoint
    from pipelines.scoring.sample_grid import sample_grid

    torch.set_num_threads(config.evaluate.cpus_per_worker)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grid.png"
        opened = open_checkpoint(checkpoint)
        sample_grid(opened.path, config.evaluate, config.seed, str(file), classes=None, columns=COLUMNS)
        return file.read_bytes()
