"""Stop all workers of a training after the same step, when the driver asks for it or checkpoints cannot be written."""

import time

from pipelines.training.group.worker import CheckpointWriter, Worker

EXCHANGE_SECONDS = 0.5
"""About how often the workers tell each other whether they have been asked."""


class StopExchange:
    """The `stop` of the training loop: whether any worker was asked to stop.

    Workers exchange what they know about every half second. They count that in batches, and agree on the number, so
    that all of them exchange, and stop, after the same batch.
    """

    def __init__(self, worker: Worker, writer: CheckpointWriter):
        """writer: of the training's checkpoints, whose error ends the training."""
        self._worker, self._writer = worker, writer
        self._batches, self._exchange_after = 0, 1
        self._exchanged_at = time.perf_counter()

    def __call__(self) -> bool:
        """Return whether to stop after this batch; called after every one. Collective.

        Raises the error of a checkpoint that could not be written, unless a newer one shall be written now.
        """
        self._batches += 1
        if self._batches < self._exchange_after:
            return False
        now = time.perf_counter()
        batches_per_second = self._batches / max(now - self._exchanged_at, 1e-9)
        answers = self._worker.gather((self._worker.stop_requested(), batches_per_second))
        slowest = min(rate for _, rate in answers)
        self._batches, self._exchange_after = 0, max(1, int(slowest * EXCHANGE_SECONDS))
        self._exchanged_at = time.perf_counter()
        if any(requested for requested, _ in answers):
            return True
        self._writer.raise_error()
        return False
