"""The folder of checkpoints before a training begins or resumes: which stay, which are moved away or taken back."""

import math
from collections.abc import Callable

from pipelines.artifacts import Artifact
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.recipe import Recipe
from pipelines.console import say
from pipelines.training.starting.extension import explain_schedule_change


def prepare_checkpoints(
    artifact: Artifact,
    steps: int,
    before_move: Callable[[], object] = lambda: None,
    same_rates: Callable[[int], bool] = lambda step: False,
) -> None:
    """Reserve the folder for this training; checkpoints of another one, or beyond `steps`, are moved away first.

    Superseded checkpoints of this training are taken back, those that reach `steps` before any others. If regular
    checkpoints lie beyond `steps`, training begins anew, unless one up to `steps` is on the way of the shorter training
    too: same_rates(step) says whether its learning rates are those of the recipe. Then those beyond are moved away
    alone, as interrupted ones always are. An interrupted one at `steps` stays: the workers make a regular one of it.
    before_move: as in `Artifact.prepare`.
    """
    checkpoints = CheckpointFolder(artifact.folder)
    finished = checkpoints.finished_steps()
    last, on_the_way = (max((step for step in finished if step <= most), default=0) for most in (math.inf, steps))

    def reaches(folder: str) -> bool:
        return last_regular_step(folder) == steps

    def leads_to(folder: str) -> bool:
        return last_regular_step(folder) <= steps

    is_further = 0 < last < steps and artifact.find_superseded(reaches) is not None
    goes_back = last > steps and on_the_way > 0 and not artifact.changes() and same_rates(on_the_way)
    reasons = [f"train.steps: {last} -> {steps}"] if (last > steps and not goes_back) or is_further else []
    artifact.prepare(reasons, fits=leads_to, is_finished=reaches, before_move=before_move)
    for step in checkpoints.all_steps():
        if step > steps:
            kept = checkpoints.set_aside(step)
            say("train", f"the checkpoint of step {step:,}, beyond train.steps = {steps:,}, is kept in {kept}")


def last_regular_step(folder: str) -> int:
    """Return the step of the last checkpoint in a folder at which no training was stopped; 0 if there is none."""
    return max(CheckpointFolder(folder).finished_steps(), default=0)


def describe_schedule_change(config: Recipe, checkpoints: CheckpointFolder, first: int) -> str:
    """Return in words how the learning rate changes at step `first`, from which training resumes; empty if not.

    Raises InvalidInput if the recipe's learning rate is not that of the steps that are done.
    """
    recorded = (checkpoints.describe(first).record.recipe or {}).get("train") if first else None
    return explain_schedule_change(config.train, recorded, first) if recorded else ""
