"""Grids of samples from the checkpoints of a training that goes on, drawn by Ray tasks of their own."""

from pathlib import Path

from pipelines.config import Recipe
from pipelines.stage import StageContext

COLUMNS = 8
PATIENCE_SECONDS = 600.0


class Previews:
    """Starts a grid for every checkpoint that is due, and hands it to tracking when it is there.

    Seed and labels are the same in all of them, so that one sees the same images become sharp.
    """

    def __init__(self, context: StageContext, config: Recipe, run):
        self._context, self._config, self._run = context, config, run
        self._pending: dict = {}

    def start(self, checkpoint: Path, step: int) -> None:
        """Begin the grid of a checkpoint, if the recipe asks for one at its step."""
        every = self._config.train.sample_every
        if not every or step % every:
            return
        import ray

        evaluate = self._config.evaluate
        draw = ray.remote(num_cpus=evaluate.cpus_per_worker, num_gpus=evaluate.gpus_per_worker, max_retries=1)(_draw)
        file = self._config.folder("samples") / f"{checkpoint.name}.png"
        self._pending[draw.remote(str(checkpoint), self._config, str(file))] = step

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
                self._run.image(Path(ray.get(reference)), "samples", step)
            except Exception as error:  # training is worth more than a picture of it
                self._context.say("train", f"no samples of step {step:,}: {str(error).strip().splitlines()[-1]}")
        if wait and late:
            steps = ", ".join(f"{self._pending[reference]:,}" for reference in late)
            self._context.say(
                "train", f"no samples of step {steps} after {PATIENCE_SECONDS:.0f} s: not waiting for them"
            )


def _draw(checkpoint: str, config: Recipe, file: str) -> str:
    import torch

    from pipelines.sample import sample_grid

    torch.set_num_threads(config.evaluate.cpus_per_worker)
    return str(sample_grid(checkpoint, config, Path(file), classes=None, columns=COLUMNS))
