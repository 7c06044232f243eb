"""What happens when a batch's loss or gradient is not finite. Such a batch never changes the weights."""

import numpy as np
import torch

from dit.train import NonFiniteError
from pipelines.config.training import TrainConfig
from pipelines.latents.dataset import LatentDataset
from pipelines.training.batches import LatentBatch
from pipelines.training.worker import Worker
from raydit.errors import Diverged

MAX_NAMED_IMAGES = 4
"""Images that a message about a batch names."""
MAX_ROLLBACKS = 3
"""Rollbacks to the same checkpoint before training stops."""


class RollbackRequested(Exception):
    """Several batches in a row gave no step, so the weights themselves are suspect: return to the last checkpoint."""


class NonFiniteGuard:
    """The `on_nonfinite` of the training loop: skips the batch, requests a rollback, or stops the training."""

    def __init__(self, config: TrainConfig, worker: Worker, dataset: LatentDataset):
        self._config, self._worker, self._dataset = config, worker, dataset
        self._skipped_in_a_row = 0
        self._step = -1
        self._rollback_step, self._rollbacks = -1, 0

    def __call__(self, error: NonFiniteError, batch: LatentBatch) -> None:
        """Return in order to skip the batch, or raise RollbackRequested or Diverged. Collective."""
        images = self._describe_images(batch)
        numbers = f"loss {error.loss}, gradient norm {error.grad_norm}, learning rate {error.lr:.1e}"
        if self._config.on_nonfinite == "stop":
            raise Diverged(
                f"step {error.step + 1}: {numbers} for a batch whose {images}",
                "finite numbers",
                "lower train.learning_rate, set train.grad_clip, or set train.on_nonfinite to 'skip'",
            )
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if error.step == self._step else 1
        self._step = error.step
        self._worker.notice(
            f"step {error.step + 1}: {numbers}; skipped the batch ({self._skipped_in_a_row} in a row), whose {images}"
        )
        if self._skipped_in_a_row >= self._config.max_skipped:
            raise RollbackRequested

    def on_rollback(self, step: int | None) -> None:
        """Record a rollback to the checkpoint of a step; None: there is no checkpoint.

        Raises Diverged if there is none, or if earlier rollbacks to the same step did not help.
        """
        if step is None or (step == self._rollback_step and self._rollbacks == MAX_ROLLBACKS):
            reason = "there is no checkpoint yet" if step is None else f"rolling back to step {step:,} did not help"
            raise Diverged(
                f"step {self._step + 1}: no finite gradient in {self._skipped_in_a_row} batches in a row, and {reason}",
                "",
                "lower train.learning_rate, set train.grad_clip, or raise train.max_skipped if the images named above "
                "are bad",
            )
        self._rollbacks = self._rollbacks + 1 if step == self._rollback_step else 1
        self._rollback_step, self._skipped_in_a_row, self._step = step, 0, -1
        self._worker.notice(f"batches skipped in a row: {self._config.max_skipped}; rolling back to step {step:,}")

    def _describe_images(self, batch: LatentBatch) -> str:
        """Name images of the global batch with their timesteps, those with non-finite latents first. Collective."""
        bad = ~torch.isfinite(batch.latents).flatten(1).all(1).cpu()
        gathered = self._worker.gather((batch.rows.numpy(), batch.t.cpu().numpy(), bad.numpy()))
        rows, t, bad_rows = (np.concatenate(arrays) for arrays in zip(*gathered, strict=True))
        first = np.argsort(~bad_rows, kind="stable")[:MAX_NAMED_IMAGES]
        keys = self._dataset.keys(rows[first])
        named = ", ".join(
            f"{key} (t = {time:.4g}{', latents not finite' if is_bad else ''})"
            for key, time, is_bad in zip(keys, t[first], bad_rows[first], strict=True)
        )
        return f"{len(rows)} images include {named}"
