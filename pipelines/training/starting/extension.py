"""Trainings that continue beyond their planned end: what happens to the learning rate, and what may not change."""

from collections.abc import Mapping
from typing import Any

from dit.schedule import TrainingConfig, learning_rate
from raydit.errors import InvalidInput


def explain_schedule_change(config: TrainingConfig, recorded: Mapping[str, Any], step: int) -> str:
    """Return in words how the learning rate changes where a training resumes; empty if it continues as planned.

    recorded: [train] of the recipe in its newest checkpoint. step: that of this checkpoint. Raises InvalidInput if the
    steps that are done followed another extension than the recipe's, because the recipe would not describe the weights.
    """
    before = _recorded_schedule(config, recorded)
    _check_history(config, before, step)
    old, new = learning_rate(before, step - 1), learning_rate(config, step)
    if step == config.steps or new in (old, learning_rate(before, step)):
        return ""
    change = f"the learning rate changes from {old:.1e} to {new:.1e} at step {step:,}"
    if config.extension is not None:
        return f"{change} (train.extension = {config.extension!r})"
    change = f"{change}, because the schedule of {before.steps:,} steps is now one of {config.steps:,}"
    if config.steps < before.steps:
        return change  # the extensions are for a training that continues after its end
    ends = ",".join(map(str, _ends_until_now(before)))
    choices = {"constant": "stays at the last rate", "warmup": "warms up and decays again"}
    if before.extension in choices:  # the steps that are done followed it
        choices = {before.extension: choices[before.extension]}
    instead = ", ".join(f"--set train.extension={name} {effect}" for name, effect in choices.items())
    return (
        f"{change}. Instead, with --set train.earlier_ends=[{ends}], {instead}; --set train.extension=planned is this "
        "change, without a notice of other choices"
    )


def has_same_rates(config: TrainingConfig, recorded: Mapping[str, Any], step: int) -> bool:
    """Return whether the first `step` steps of a training had the learning rates of the recipe.

    recorded: [train] of the recipe in its checkpoints.
    """
    return _agree(config, _recorded_schedule(config, recorded), step)


def _agree(config: TrainingConfig, before: TrainingConfig, step: int) -> bool:
    return all(learning_rate(config, done) == learning_rate(before, done) for done in range(step))


def _recorded_schedule(config: TrainingConfig, recorded: Mapping[str, Any]) -> TrainingConfig:
    """Return the schedule that checkpoints record; what their identity says of it is that of the recipe."""
    return TrainingConfig(
        steps=recorded["steps"],
        learning_rate=config.learning_rate,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        extension=recorded.get("extension"),
        earlier_ends=tuple(recorded.get("earlier_ends", ())),
    )


def _check_history(config: TrainingConfig, before: TrainingConfig, step: int) -> None:
    """Raise InvalidInput if the steps before `step` were not trained at the learning rates that the recipe says."""
    was_extended = config.steps == before.steps and before.extension != config.extension
    if config.extension not in ("constant", "warmup") and not was_extended:
        return  # the schedule of more steps may differ in all of them: this is said, and allowed
    if _agree(config, before, step):
        return
    found = f"train.extension: found {config.extension!r} with train.earlier_ends = {list(config.earlier_ends)}"
    ends = _ends_until_now(before) if config.steps > before.steps else list(before.earlier_ends)
    extension = before.extension if before.earlier_ends or config.steps == before.steps else config.extension
    expected = f"{extension!r} with train.earlier_ends = {ends}"
    raise InvalidInput(
        f"{found}, although the {step:,} steps that are done followed another learning rate",
        f"{expected}, as they did",
        "set these, or another output to train from the start",
    )


def _ends_until_now(before: TrainingConfig) -> list[int]:
    return [*before.earlier_ends, before.steps]
