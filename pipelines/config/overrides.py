"""Overrides such as "tracking.uri=..." for commands that have no complete recipe to validate them with."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from pipelines.config.reader import Locate, RecipeError, apply_override, check_settings, read_recipe, unknown_keys
from pipelines.config.recipe import Recipe, TrackingConfig
from raydit.errors import InvalidInput


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the content of a recipe that has nothing but some overrides.

    Raises RecipeError for an unknown section, and where a section is set to a single value.
    """
    content: dict[str, Any] = {}
    for override in overrides:
        apply_override(content, override)
    _check_sections(content, _locate_in(overrides))
    return content


def given_tracking_uri(overrides: Sequence[str], recipe: str | None = None) -> str:
    """Return the tracking.uri that overrides set, or else a recipe; empty if neither does. recipe: path of its file.

    Raises RecipeError for a mistake in [tracking], and as `read_recipe`.
    """
    if recipe is None:
        content, locate = read_overrides(overrides), _locate_in(overrides)
    else:
        content, locate = read_recipe(recipe, tuple(overrides))
        _check_sections(content, locate)
    tracking = content.get("tracking", {})
    if mistakes := [*unknown_keys({"tracking": tracking}, Recipe, locate)]:
        raise RecipeError(*mistakes)
    check_settings(TrackingConfig, tracking, lambda key: locate(f"tracking.{key}"))
    return tracking.get("uri", "")


def _check_sections(content: dict[str, Any], locate: Locate) -> None:
    mistakes = [*unknown_keys(dict.fromkeys(content), Recipe, locate)]
    for name, section in typing.get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(section) and not isinstance(value := content.get(name, {}), dict):
            do = f"set a field of it, such as {name}.{dataclasses.fields(section)[0].name}"
            mistake = InvalidInput(f"{locate(name)}: found {value!r}", "a section", do)
            mistakes.append(str(mistake))
    if mistakes:
        raise RecipeError(*mistakes)


def _locate_in(overrides: Sequence[str]) -> Locate:
    """Return the function that names the override by which a key, or a key below it, was set."""
    flags = sorted(override.partition("=")[0].strip() for override in overrides)

    def locate(key: str) -> str:
        below = (flag for flag in flags if flag.startswith(f"{key}."))
        return f"--set {key if key in flags else next(below, key)}"

    return locate
