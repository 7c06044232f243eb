"""A training whose newest checkpoint is damaged: it resumes from the newest one that is not."""

import shlex
from collections.abc import Callable

from cluster import storage
from pipelines.checkpoints.folder import CheckpointFolder
from raydit.errors import InvalidInput


def set_aside_damaged(checkpoints: CheckpointFolder, say: Callable[[str], object]) -> None:
    """Move damaged checkpoints to `checkpoints.superseded` if they are newer than all others, and say so.

    Raises InvalidInput, with all checkpoints where they are, if there are only damaged ones.
    """
    steps = checkpoints.all_steps()[::-1]
    damaged: dict[int, str] = {}
    for step in steps:
        if not (damage := checkpoints.find_damage(step)):
            break
        damaged[step] = damage
    if damaged and len(damaged) == len(steps):
        newest, uri = steps[0], checkpoints.uri
        away = shlex.join(["mv", uri, f"{uri}-damaged"]) if storage.is_local(uri) else f"move {uri} away"
        raise InvalidInput(
            f"the checkpoint of step {newest:,} is damaged ({damaged[newest]}), and so are all before it",
            "one to resume from",
            f"copy it again; or, to train from step 0, {away}",
        )
    for step, damage in damaged.items():
        kept = checkpoints.set_aside_damaged(step)
        say(f"the checkpoint of step {step:,} is damaged ({damage}); it is kept in {kept}")
