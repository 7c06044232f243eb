"""A recipe given for an evaluation or for sampling, which overrides the one that a checkpoint records."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from pipelines.artifacts import differences
from pipelines.checkpoints.open import LocatedCheckpoint
from pipelines.config.reader import read_recipe, resolved, validate_recipe
from pipelines.config.recipe import Recipe
from pipelines.config.training import NON_IDENTITY_FIELDS
from pipelines.console import say
from pipelines.latents.class_order import with_recorded_class_order
from pipelines.scoring.protocols.build_protocol import recorded_content

OF_CHECKPOINT = ("model", "objective", "autoencoder")
"""Sections of a recipe that describe how a checkpoint was made: its own record is right, whatever the recipe says."""
OF_EACH_CHECKPOINT = ("sampler", "weights")
"""Fields of [evaluate] that fit one checkpoint and not another: they are checked when there is one."""
MAX_DIFFERENCES = 4


def load_given_recipe(path: str, overrides: tuple[str, ...] = ()) -> Callable[[LocatedCheckpoint], Recipe]:
    """Read a recipe, and return a function that gives the recipe to evaluate a checkpoint by.

    That one has the sections OF_CHECKPOINT from the checkpoint, and its `random` unless an override names it, so that
    an older checkpoint keeps its protocols; it says in one line where they differ. All else is the given recipe's, but
    that evaluate.weights may name the averages that the checkpoint's training kept as well. Raises the same errors as
    `load_recipe` before there is a checkpoint, and the function raises RecipeError for a sampler or weights that do not
    fit the checkpoint.
    """
    content, locate = read_recipe(path, overrides)
    given = resolved(validate_recipe(_without_choices(content), locate, "evaluate"))

    def recipe_of(opened: LocatedCheckpoint) -> Recipe:
        recorded = recorded_content(opened)
        of_checkpoint = {name: recorded[name] for name in OF_CHECKPOINT}
        if opened.record.recipe is not None and not any(override.startswith("random=") for override in overrides):
            of_checkpoint["random"] = recorded.get("random")
        averages = given["train"]["ema_sigma_rels"], recorded.get("train", {}).get("ema_sigma_rels", ())
        of_checkpoint["train"] = content.get("train", {}) | {"ema_sigma_rels": list(dict.fromkeys(chain(*averages)))}
        config = validate_recipe(content | of_checkpoint, locate, "evaluate")
        if lines := _overruled(given, resolved(config)):
            say("recipe", f"{opened.name} is used as it was trained, not as {path} says: {'; '.join(lines)}")
        return with_recorded_class_order(config, opened.record.recipe)

    return recipe_of


def _without_choices(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content without OF_EACH_CHECKPOINT: the defaults fit any objective and training."""
    evaluate = content.get("evaluate")
    if not isinstance(evaluate, dict):
        return content
    return content | {"evaluate": {name: value for name, value in evaluate.items() if name not in OF_EACH_CHECKPOINT}}


def _overruled(given: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """Return the differences between a recipe's sections and those of the checkpoint that are used in their place."""
    ours = {name: given[name] for name in OF_CHECKPOINT if name in given}
    theirs = {name: used[name] for name in ours}
    ours["random"], theirs["random"] = given.get("random"), used.get("random")
    lines = differences(*(json.loads(json.dumps(sections)) for sections in (ours, theirs)))
    lines = [line for line in lines if line.partition(":")[0].rpartition(".")[2] not in NON_IDENTITY_FIELDS]
    lines = [re.sub(r"^([^{]*)\{.*\}", r"\1{...}", line) for line in lines]  # a whole section, against none
    more = len(lines) - MAX_DIFFERENCES
    return lines if more <= 0 else [*lines[:MAX_DIFFERENCES], f"and {more} more"]
