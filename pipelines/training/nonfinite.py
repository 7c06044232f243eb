"""What becomes of batches whose loss or gradient is not finite. They never reach the weights; here they are named."""

import numpy as np
import torch

from dit.train import NonFiniteError
from pipelines.config.training import TrainConfig
from pipelines.latents.dataset import LatentDataset
from pipelines.training.batches import LatentBatch
from pipelines.training.worker import Worker

NAMED = 4
"""Images that a notice names."""
RETURNS = 3
"""How often training goes back to the same checkpoint before it stops."""


class RollbackRequested(Exception):
    """Too many batches in a row gave no step: the weights themselves are suspect."""


class NonFiniteGuard:
    """Called by the training loop with every such batch: leaves it out, goes back to the last checkpoint, or stops."""

    def __init__(self, config: TrainConfig, worker: Worker, dataset: LatentDataset):
        self._config, self._worker, self._dataset = config, worker, dataset
        self._in_a_row = 0
        self._step = -1
        self._returned_to, self._returns = -1, 0

    def __call__(self, error: NonFiniteError, batch: LatentBatch) -> None:
        """Skip the batch by returning, or raise RollbackRequested or FloatingPointError. All workers call it."""
        images = self._images(batch)
        if self._config.on_nonfinite == "stop":
            raise FloatingPointError(f"{error}. {images}. Or set train.on_nonfinite to 'skip'")
        self._in_a_row = self._in_a_row + 1 if error.step == self._step else 1
        self._step = error.step
        self._worker.notice(
            f"step {error.step + 1}: loss {error.loss}, gradient norm {error.grad_norm}, learning rate {error.lr:.1e}; "
            f"this batch is left out ({self._in_a_row} in a row). {images}"
        )
        if self._in_a_row >= self._config.max_skipped:
            raise RollbackRequested

    def on_rollback(self, step: int | None) -> None:
        """Be told which checkpoint training went back to. Raises FloatingPointError if that cannot help."""
        if step is None or (step == self._returned_to and self._returns == RETURNS):
            where = "there is no checkpoint yet" if step is None else f"going back to step {step:,} did not help"
            raise FloatingPointError(
                f"step {self._step + 1}: {self._in_a_row} batches in a row gave no finite gradient, and {where}. Lower "
                "train.learning_rate, set train.grad_clip, or raise train.max_skipped if the images named above are bad"
            )
        self._returns = self._returns + 1 if step == self._returned_to else 1
        self._returned_to, self._in_a_row, self._step = step, 0, -1
        self._worker.notice(f"{self._config.max_skipped} batches in a row were left out; back to step {step:,}")

    def _images(self, batch: LatentBatch) -> str:
        """Which images and timesteps the batch had over all workers, those with bad latents first."""
        bad = ~torch.isfinite(batch.latents).flatten(1).all(1).cpu()
        gathered = self._worker.gather((batch.rows.numpy(), batch.t.cpu().numpy(), bad.numpy()))
        rows, t, bad_rows = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
        first = np.argsort(~bad_rows, kind="stable")[:NAMED]
        keys = self._dataset.keys(rows[first])
        named = ", ".join(
            f"{key} (t = {time:.4g}{', latents not finite' if wrong else ''})"
            for key, time, wrong in zip(keys, t[first], bad_rows[first], strict=True)
        )
        return f"Of its {len(rows)} images: {named}"
