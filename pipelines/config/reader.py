"""Reading recipes: TOML and overrides in, a validated `Recipe` out, or one error that names every mistake."""

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.credentials import refuse_credentials
from pipelines.config.recipe import Recipe


class RecipeError(ValueError):
    """A recipe that cannot be run: a line for each mistake, with what was found and what was expected."""


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply `overrides` ("train.steps=100"), validate everything.

    Raises FileNotFoundError or RecipeError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}: expected a TOML file, such as pipelines/recipes/digits.toml")
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not TOML: found {error.reason}, expected UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    refuse_credentials({str(path): text})
    for override in overrides:
        apply_override(content, override)
    lines = _line_numbers(text)
    from_flags = {override.partition("=")[0].strip() for override in overrides}

    def place(key: str) -> str:
        if key in from_flags:
            return f"--set {key}"
        section = key
        while section and section not in lines:
            section = section.rpartition(".")[0]
        below = next((flag for flag in sorted(from_flags) if flag.startswith(f"{key}.")), None)
        if below and section != key:
            return f"--set {below}"
        return f"{path}:{lines[section]}: {key}" if section else f"{path}: {key}"

    return validate_recipe(content, place)


def validate_recipe(content: dict, place=lambda key: key) -> Recipe:
    """Build a `Recipe` from plain data. `place(key)` says where a dotted key came from, for the error."""
    from pydantic import TypeAdapter, ValidationError

    mistakes = list(_unknown_keys(content, Recipe, place))
    # What is missing or contradicts itself may be the misspelt key's doing.
    consequences = ("missing", "value_error") if mistakes else ()
    try:
        # JSON mode is the strict mode that takes lists for tuples and integers for floats, and nothing else.
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        mistakes += [_sentence(details, place) for details in error.errors() if details["type"] not in consequences]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def apply_override(content: dict, override: str) -> None:
    """Put "section.field=value" into a recipe's content; the value is TOML, or a plain string."""
    key, equals, raw = override.partition("=")
    refuse_credentials({f"--set {key if equals else '...'}": override})
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as --set train.learning_rate=2e-4")
    *sections, name = key.strip().split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {override}: {section} is a value, not a section")
    try:
        content[name] = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        content[name] = raw.strip()


def _unknown_keys(content: dict, cls: type, place, prefix: str = ""):
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            nearest = f'did you mean "{prefix}{close[0]}"? ' if close else ""
            yield f"{place(dotted)}: unknown key; {nearest}expected one of {', '.join(hints)}"
        elif (section := _dataclass_of(hints[key])) and isinstance(value, dict):
            yield from _unknown_keys(value, section, place, f"{dotted}.")


def _dataclass_of(hint) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)


def _sentence(details: Mapping, place) -> str:
    # Arguments of a union or a tuple appear in the location too; only names of fields are keys.
    names = [part for part in details["loc"] if isinstance(part, str) and part.isidentifier()]
    names = [name for name in names if not name.endswith("Config") and name != "Recipe"]
    key = ".".join(names)
    found = details.get("input")
    if details["type"] == "missing":
        return f"{place(key)}: missing; expected a value (every recipe must set it)"
    if details["type"] == "value_error":
        return _contradiction(key, str(details["ctx"]["error"]), place)
    kind = "a section" if isinstance(found, dict) else f"{found!r}, a {type(found).__name__}"
    return f"{place(key)}: found {kind}; expected: {details['msg']}"


def _contradiction(section: str, message: str, place) -> str:
    # Checks of several fields begin with the one to change: "width = 12: ...", "sampler: found ...".
    match = re.match(r"([a-z_.]+)(: | = | is )", message)
    if not match:
        return f"{place(section)}: {message}"
    key = f"{section}.{match[1]}".lstrip(".")
    return f"{place(key)}: {message[match.end() :] if match[2] == ': ' else message}"


def _line_numbers(text: str) -> dict[str, int]:
    """Line of every key and section, for the error messages; good enough for hand-written TOML."""
    section, lines = "", {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([\w.\-]+)\]", line):
            section = f"{header[1]}."
            lines[header[1]] = number
        elif assignment := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines[section + assignment[1]] = number
    return lines


def resolved(recipe: Recipe) -> dict:
    """The recipe as plain data with every default filled in: what artifacts and runs record."""
    return dataclasses.asdict(recipe)


def image_recipe(path: str, output: str, overrides: tuple[str, ...] = (), **images) -> Recipe:
    """A recipe for what only looks at images: its model is never built. images: further fields of [images]."""
    content: dict = {
        "name": Path(path).stem or "images",
        "output": output,
        "images": {"path": path, **images},
        "autoencoder": {"id": "none"},
        "model": {"name": "DiT-S/2"},
    }
    for override in overrides:
        apply_override(content, override)
    return validate_recipe(content)
