"""What happens when a batch's loss or gradient is not finite. Such a batch never changes the weights."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from dit.checkpoint import restore
from dit.train import NonFiniteError, TrainState
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.latents.dataset import LatentDataset
from pipelines.training.data.batches import LatentBatch
from pipelines.training.group.worker import CheckpointWriter, Worker
from raydit.errors import Diverged

MAX_NAMED_IMAGES = 4
"""Images that a message about a batch names."""
MAX_ROLLBACKS = 3
"""Rollbacks to the same checkpoint before training stops."""


class RollbackRequested(Exception):
    """Several batches in a row gave no step, so the weights themselves are suspect: return to the last checkpoint."""


class NonFiniteGuard:
    """The `on_nonfinite` of the training loop: skips the batch, requests a rollback, or stops the training."""

    def __init__(
        self,
        worker: Worker,
        *,
        section: str,
        on_nonfinite: Literal["skip", "stop"],
        max_skipped: int,
        describe_images: Callable[[Any], str],
    ):
        """section: of the recipe, for messages. describe_images: says in words which images a batch has; collective."""
        self._worker, self._section, self._describe_images = worker, section, describe_images
        self._on_nonfinite, self._max_skipped = on_nonfinite, max_skipped
        self._skipped_in_a_row = 0
        self._step = -1
        self._rollback_step, self._rollbacks = -1, 0

    def __call__(self, error: NonFiniteError, batch: Any) -> None:
        """Return in order to skip the batch, or raise RollbackRequested or Diverged. Collective."""
        images, section = self._describe_images(batch), self._section
        numbers = f"loss {error.loss}, gradient norm {error.grad_norm}, learning rate {error.lr:.1e}"
        if self._on_nonfinite == "stop":
            raise Diverged(
                f"step {error.step + 1}: {numbers} for a batch whose {images}",
                "finite numbers",
                f"lower {section}.learning_rate, set {section}.grad_clip, or set {section}.on_nonfinite to 'skip'",
            )
        self._skipped_in_a_row, self._step = error.skipped, error.step
        self._worker.notice(
            f"step {error.step + 1}: {numbers}; skipped the batch ({self._skipped_in_a_row} in a row), whose {images}"
        )
        if self._skipped_in_a_row >= self._max_skipped:
            raise RollbackRequested

    def on_rollback(self, step: int | None) -> None:
        """Record a rollback to the regular checkpoint of a step; None: there is none.

        Raises Diverged if there is none, or if earlier rollbacks to the same step did not help.
        """
        section = self._section
        if step is None or (step == self._rollback_step and self._rollbacks == MAX_ROLLBACKS):
            reason = (
                "there is no regular checkpoint yet" if step is None else f"rolling back to step {step:,} did not help"
            )
            raise Diverged(
                f"step {self._step + 1}: no finite gradient in {self._skipped_in_a_row} batches in a row, and {reason}",
                "",
                f"lower {section}.learning_rate, set {section}.grad_clip, or raise {section}.max_skipped if the images "
                "named above are bad",
            )
        self._rollbacks = self._rollbacks + 1 if step == self._rollback_step else 1
        self._rollback_step, self._skipped_in_a_row, self._step = step, 0, -1
        self._worker.notice(f"batches skipped in a row: {self._max_skipped}; rolling back to step {step:,}")


def describe_latents(worker: Worker, dataset: LatentDataset) -> Callable[[LatentBatch], str]:
    """Return a function that names images of a global batch with their timesteps, those with bad latents first."""

    def describe(batch: LatentBatch) -> str:
        bad = ~torch.isfinite(batch.latents).flatten(1).all(1).cpu()
        gathered = worker.gather((batch.rows.numpy(), batch.t.cpu().numpy(), bad.numpy()))
        rows, t, bad_rows = (np.concatenate(arrays) for arrays in zip(*gathered, strict=True))
        first = np.argsort(~bad_rows, kind="stable")[:MAX_NAMED_IMAGES]
        keys = dataset.keys(rows[first])
        named = ", ".join(
            f"{key} (t = {time:.4g}{', latents not finite' if is_bad else ''})"
            for key, time, is_bad in zip(keys, t[first], bad_rows[first], strict=True)
        )
        return f"{len(rows)} images include {named}"

    return describe


def go_on_after_rollbacks(
    run: Callable[[], object],
    guard: NonFiniteGuard,
    state: TrainState,
    checkpoints: CheckpointFolder,
    writer: CheckpointWriter,
    worker: Worker,
) -> None:
    """Run the training loop, and again from the last regular checkpoint at every rollback of the guard. Collective.

    run: runs the loop from batch number `state.batches` on, after the skipped batches.
    """
    while True:
        try:
            run()
            return
        except RollbackRequested:
            writer.wait()
            # Regular ones: an unbroken training would have no interrupted checkpoint to return to.
            steps, batches_taken = checkpoints.finished_steps() if worker.rank == 0 else [], state.batches
            step = max(worker.gather(steps)[0], default=None)
            guard.on_rollback(step)
            assert step is not None, "the guard raises Diverged without a checkpoint"
            if worker.rank == 0:
                checkpoints.remove_interrupted()
            restore(state, checkpoints.open(step, resumable=True))
            state.batches = batches_taken  # the same batches would fail in the same way
