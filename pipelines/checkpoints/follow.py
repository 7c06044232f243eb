"""Follow a training: yield its checkpoints as they are written."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster import storage
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.recipe import Recipe
from pipelines.console import say
from raydit.errors import InvalidInput

POLL_SECONDS = 5.0

Target = tuple[LocatedCheckpoint, Recipe]
"""A checkpoint, and the recipe that it is evaluated by."""


def follow_checkpoints(
    folder: str,
    every: int,
    recipe_of: Callable[[LocatedCheckpoint], Recipe],
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Target]:
    """Yield every n-th checkpoint of a training as it appears in `folder`, and end with the last one.

    A checkpoint is an n-th one if its step divided by train.checkpoint_every is a multiple of `every`, so that a
    restarted watcher chooses the same checkpoints. The last one is that of step train.steps, unless there is a later
    one: the training was extended then. Raises InvalidInput for an imported checkpoint.
    """
    checkpoints, seen = CheckpointFolder(folder), set[int]()
    state = "" if storage.exists(folder) else ", which does not exist yet"
    say("evaluate", f"watching {folder}{state}; press Ctrl-C to stop, and run the same command to resume")
    while True:
        for step in checkpoints.finished_steps():
            if step in seen:
                continue
            seen.add(step)
            try:
                opened = checkpoints.describe(step)
                train = _train_settings(opened)
                is_last = opened.step >= train["steps"] and step == checkpoints.last_step()
                is_chosen = is_last or opened.step // train["checkpoint_every"] % every == 0
                if is_chosen:
                    opened = checkpoints.open(step)  # which fetches its weights from an object store
            except FileNotFoundError:
                say_removed(step)
                continue
            if is_chosen:
                yield opened, recipe_of(opened)
            if is_last and step == checkpoints.last_step():  # none was added in the meantime
                return
        sleep(POLL_SECONDS)


def _train_settings(opened: LocatedCheckpoint) -> Mapping[str, Any]:
    """Return [train] of the recipe that a checkpoint records. Raises InvalidInput for an imported checkpoint."""
    recipe = opened.record.recipe or {}
    if recipe.get("train") is None:
        raise InvalidInput(
            f"{opened.origin} is imported and records no recipe",
            "a checkpoint of a training",
            "evaluate it without --watch",
        )
    return recipe["train"]


def say_removed(step: int) -> None:
    """Say that the checkpoint of a step cannot be scored any more."""
    say("evaluate", f"step {step:,} was removed before it was scored: the training keeps fewer checkpoints")
