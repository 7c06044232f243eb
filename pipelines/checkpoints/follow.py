"""Follow a training: its checkpoints as they appear."""

import time
from collections.abc import Callable, Iterator

from pipelines.checkpoints.open import LocatedCheckpoint, open_checkpoint
from pipelines.checkpoints.stored import checkpoint_location, finished_steps
from pipelines.config.recipe import Recipe
from pipelines.console import say

POLL_SECONDS = 5.0


Target = tuple[LocatedCheckpoint, Recipe]


def follow_checkpoints(
    folder: str, every: int, recipe_of: Callable[[LocatedCheckpoint], Recipe], *, sleep: Callable = time.sleep
) -> Iterator[Target]:
    """Checkpoints of a training as they appear in `folder`, every n-th and the last, with which it ends.

    The n-th: its step divided by train.checkpoint_every is a multiple of n, so that a watcher that is started again
    chooses the same ones.
    """
    done: set[int] = set()
    say("evaluate", f"watching {folder}; Ctrl-C ends it, the same command goes on")
    while True:
        for step in finished_steps(folder):
            if step in done:
                continue
            done.add(step)
            try:
                opened = open_checkpoint(checkpoint_location(folder, step))
            except FileNotFoundError:
                say("evaluate", f"step {step:,} was removed before it could be scored: the training keeps fewer")
                continue
            train = (opened.record.recipe or {}).get("train")
            if train is None:
                raise ValueError(
                    f"{opened.origin} is imported: found no recipe, expected a checkpoint of a training to watch. "
                    "Evaluate it without --watch"
                )
            is_last = opened.step >= train["steps"]
            if is_last or opened.step // train["checkpoint_every"] % every == 0:
                yield opened, recipe_of(opened)
            if is_last:
                return
        sleep(POLL_SECONDS)
