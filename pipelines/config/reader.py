"""Reading recipes: from TOML and overrides to a validated `Recipe`, or to one error that names every mistake."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.credentials import refuse_credentials
from dit.field_names import SYNONYMS, with_recorded_names
from dit.sampler_names import fitting_samplers
from pipelines.config.model import AbsentModel
from pipelines.config.recipe import AbsentAutoencoder, Recipe
from pipelines.config.toml_text import MAX_RECIPE_BYTES, TomlError, parse_toml
from raydit.errors import InvalidInput, NotFound
from raydit.lfs import refuse_lfs_pointer_file
from raydit.regular_files import read_regular

Locate = Callable[[str], str]
"""Maps a dotted key to where a user wrote it: a line of the file, or a flag."""


ALWAYS_RECORDED = frozenset(
    f"{section}.{name}"
    for section, names in {
        "images": "format subset image_column label_column class_names",
        "autoencoder": "id train",
        "autoencoder.train": "accelerator_type label_selector ema_sigma_rels",
        "encode": "accelerator_type label_selector output",
        "model": "name architecture patch_size hidden_size depth num_heads "
        "qk_norm norm mlp position timestep_frequency_shift",
        "objective": "time schedule prediction variance weighting min_snr_gamma",
        "train": "accelerator_type label_selector ema_sigma_rels keep_last keep_every keep_best",
        "evaluate": "accelerator_type label_selector cfg_channels cfg_interval extractor_weights reference",
    }.items()
    for name in names.split()
)
"""Optional fields of the first recipes, which are recorded as null or () where they are not set.

The list is closed: fields that are added later are recorded only where they are set, so that digests stay.
"""


ABSENT: dict[str, Any] = {"model": AbsentModel(), "autoencoder": AbsentAutoencoder()}
"""Sections without which some stages work, and what stands for them in the recipe of such a stage."""
PLACEHOLDERS: dict[str, dict[str, Any]] = {"model": {"name": "DiT-S/2"}, "autoencoder": {"id": "none"}}
"""Sections that pass validation where there are none."""
NEEDED_SECTIONS: dict[str, tuple[str, ...]] = {
    "autoencoder": ("autoencoder",),
    "encode": ("autoencoder",),
    "evaluate": (),  # the checkpoint has them
    "sample": (),
}
"""Which of the sections in ABSENT a stage needs, if it does not need all of them."""


_DOT = re.compile(r'\.(?=(?:[^"]*"[^"]*")*[^"]*$)')
"""A dot between the parts of a key, and not inside of quotes."""


class RecipeError(InvalidInput):
    """A recipe that cannot be run; the message has one line for each mistake."""

    def __init__(self, *mistakes: str):
        super().__init__("\n".join(mistakes), "", "")
        self.mistakes = mistakes

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self.mistakes


def load_recipe(path: str | Path, overrides: tuple[str, ...] = (), stage: str = "") -> Recipe:
    """Read a recipe, apply overrides such as "train.steps=100", and validate the result.

    stage: name of the command that the recipe is for, which may work without some sections (NEEDED_SECTIONS). Raises
    NotFound if there is no such file, RecipeError if it is not TOML or has mistakes, and InvalidInput if it contains
    credentials.
    """
    return validate_recipe(*read_recipe(path, overrides), stage)


def read_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> tuple[dict[str, Any], Locate]:
    """Read a recipe and apply overrides, without validating it; also return where its keys are written.

    Raises the same errors as `load_recipe`, but not for mistakes in values.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no recipe at {path}", "a TOML file, such as pipelines/recipes/digits.toml", "check the path")
    refuse_lfs_pointer_file(path, "the recipe")
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        content = parse_toml(text)
    except UnicodeDecodeError as error:
        raise RecipeError(_mistake(f"{path}: not TOML: found {error.reason}", "UTF-8", "save it as UTF-8")) from None
    except TomlError as error:
        raise RecipeError(_mistake(f"{path}: not TOML: {error}", "", "correct that line")) from None
    refuse_credentials({str(path): text})
    for override in overrides:
        apply_override(content, override)
    lines = _line_numbers(text)
    from_flags = {override.partition("=")[0].strip() for override in overrides}

    def locate(key: str) -> str:
        if key in from_flags:
            return f"--set {key}"
        section = key
        while section and section not in lines:
            section = section.rpartition(".")[0]
        below = next((flag for flag in sorted(from_flags) if flag.startswith(f"{key}.")), None)
        if below and section != key:
            return f"--set {below}"
        return f"{path}:{lines[section]}: {key}" if section else f"{path}: {key}"

    return content, locate


def validate_recipe(content: dict[str, Any], locate: Locate = lambda key: key, stage: str = "") -> Recipe:
    """Build a `Recipe` from plain data. Raises RecipeError, whose lines begin with `locate(key)` of the wrong key.

    stage: as for `load_recipe`.
    """
    from pydantic import TypeAdapter, ValidationError

    absent = ABSENT.keys() - content.keys() - {*NEEDED_SECTIONS.get(stage, ABSENT)}
    content = _with_fitting_sampler(content | {section: PLACEHOLDERS[section] for section in absent})
    content, written, mistakes = _with_recorded_names(content, locate)
    mistakes += unknown_keys(content, Recipe, locate)
    # Missing and contradicting values may be consequences of the misspelt key.
    consequences = ("missing", "value_error") if mistakes else ()
    try:
        # JSON mode is the strict mode that takes lists for tuples and integers for floats, and nothing else.
        recipe = TypeAdapter(Recipe).validate_json(_to_json(content), strict=True)
        mistakes += _not_finite(dataclasses.asdict(recipe), locate)
    except ValidationError as error:
        mistakes += _describe([each for each in error.errors() if each["type"] not in consequences], locate, written)
    if mistakes:
        raise RecipeError(*mistakes)
    return dataclasses.replace(recipe, **{section: ABSENT[section] for section in absent})


def check_settings(section: type, settings: dict[str, Any], locate: Locate) -> None:
    """Raise RecipeError if a section such as EvaluateConfig cannot have some settings; each is read as in a recipe."""
    from pydantic import TypeAdapter, ValidationError

    try:
        read: Any = TypeAdapter(section).validate_json(_to_json(settings), strict=True)
    except ValidationError as error:
        raise RecipeError(*_describe(error.errors(), locate, {})) from None
    if mistakes := [*_not_finite({name: getattr(read, name) for name in settings}, locate)]:
        raise RecipeError(*mistakes)


def _to_json(content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, default=str)
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "with a number of thousands of digits"
        raise RecipeError(_mistake(f"found values {reason}", "the values of a recipe", "correct them")) from None


def _with_fitting_sampler(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's content with the first sampler that fits its objective, if it names none."""
    objective, evaluate = content.get("objective"), content.get("evaluate", {})
    if not isinstance(objective, dict) or not isinstance(evaluate, dict) or "sampler" in evaluate:
        return content
    fitting = fitting_samplers(objective.get("kind", "diffusion"))
    return content | {"evaluate": {"sampler": fitting[0], **evaluate}} if fitting else content


def _with_recorded_names(content: dict[str, Any], locate: Locate) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return a recipe's content with the recorded names of the model's fields, and the names that the recipe has.

    The third value is the line of a mistake, where a field has different values under its two names.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        return content, {}, []
    written = {recorded: name for name, recorded in SYNONYMS.items() if name in model}
    try:
        return content | {"model": with_recorded_names(model)}, written, []
    except InvalidInput as error:
        kept = {name: value for name, value in model.items() if name not in SYNONYMS}
        return content | {"model": kept}, {}, [_locate_check("model", str(error), locate)]


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set "section.field=value" in a recipe's content; the value is TOML, or a plain string where it is not TOML.

    Parts of the key may be quoted, as in TOML: evaluate.reference."timm:resnet50.a1_in1k". A value of the same field
    under its other name is removed.
    """
    key, equals, raw = override.partition("=")
    refuse_credentials({f"--set {key if equals else '...'}": override})
    if not equals or not key.strip():
        do = "write it such as --set train.learning_rate=2e-4"
        raise RecipeError(_mistake(f"--set {override}: found no key and value", "KEY=VALUE", do))
    *sections, name = (part.strip('"') for part in _DOT.split(key.strip()))
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            found = f"--set {override}: {section} is a value"
            raise RecipeError(_mistake(found, "a section", f"set {section} itself, or correct the key"))
    for names in SYNONYMS.items() if sections == ["model"] else ():
        if name in names:
            content.pop(names[1 - names.index(name)], None)
    try:
        content[name] = parse_toml(f"value = {raw}")["value"]
    except TomlError:
        content[name] = raw.strip()


def _mistake(found: str, expected: str, do: str) -> str:
    """Return the line of one mistake, worded as every error for users is."""
    return str(InvalidInput(found, expected, do))


def unknown_keys(content: Mapping[str, Any], cls: type, locate: Locate, prefix: str = "") -> Iterator[str]:
    """Yield the line of a mistake for each key that a dataclass, or one in it, does not have. prefix: of the keys."""
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            suggestion = f' (did you mean "{prefix}{close[0]}"?)' if close else ""
            found = f"{locate(dotted)}: unknown key{suggestion}"
            yield _mistake(found, f"one of {', '.join(hints)}", "correct or remove it")
        elif (section := _dataclass_of(hints[key])) and isinstance(value, dict):
            yield from unknown_keys(value, section, locate, f"{dotted}.")


def _not_finite(content: Mapping[str, Any], locate: Locate, prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _not_finite(value, locate, f"{prefix}{name}.")
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                key = f"{prefix}{name}"
                yield _mistake(f"{locate(key)}: found {each}", "a finite number", f"change {key}")


def _dataclass_of(hint: Any) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)


def _describe(errors: Iterable[Mapping[str, Any]], locate: Locate, written: Mapping[str, str]) -> list[str]:
    """Return a line for each mistake that pydantic found. written: names that the recipe has, by recorded names."""
    lines: dict[tuple[str, str], str] = {}
    expected: dict[tuple[str, str], list[str]] = {}  # by key and value: members of a union are reported one by one
    for details in errors:
        # The location also names members of unions and indices of tuples; only names of fields are keys.
        names = [written.get(part, part) for part in details["loc"] if isinstance(part, str) and part.isidentifier()]
        key = ".".join(name for name in names if not name.endswith("Config") and name != "Recipe")
        value = details.get("input")
        if details["type"] == "value_error":
            message = str(details["ctx"]["error"])
            lines[key, message] = _locate_check(key, message, locate)
        elif details["type"] == "missing" and isinstance(details["loc"][-1], str):
            lines[key, ""] = _mistake(f"{locate(key)}: missing", "a value", f"set {key}, which has no default")
        else:
            found = "a section" if isinstance(value, dict) else f"{value!r} ({type(value).__name__})"
            expected.setdefault((key, found), []).append(_expectation(details["msg"]))
            what = ", or ".join(expected[key, found])
            lines[key, found] = _mistake(f"{locate(key)}: found {found}", what, f"change {key}")
    return list(lines.values())


def _expectation(message: str) -> str:
    """Return what pydantic expected, such as "Input should be greater than 0", as the object of "expected"."""
    text = re.sub(r"^\w+ should (be|have) ", "", message)
    text = re.sub(r" after validation, not \d+$", "", text)
    text = re.sub(r"^a valid (?=[aeiou])", "an ", text)
    text = re.sub(r"^a valid ", "a ", text)
    if text.startswith(("greater than", "less than")):
        return f"a number {text}"
    return {"an object": "a section", "an array": "a list", "Field required": "more items"}.get(text, text)


def _locate_check(section: str, message: str, locate: Locate) -> str:
    """Return the line for a check of `__post_init__`, located at the field with which its message begins.

    Such messages begin with "width: ...", "width = 12 ..." or "width is 12 ...", or with no field.
    """
    match = re.match(r"([a-z_.]+)(: | = | is )", message)
    if not match:
        return f"{locate(section)}: {message}"
    key = f"{section}.{match[1]}".lstrip(".")
    return f"{locate(key)}: {message[match.end() :] if match[2] == ': ' else message}"


def _line_numbers(text: str) -> dict[str, int]:
    """Return the line of every key and section; it understands TOML as people write it, not all of TOML."""
    section, lines = "", {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([\w.\-]+)\]", line):
            section = f"{header[1]}."
            lines[header[1]] = number
        elif assignment := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines[section + assignment[1]] = number
    return lines


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data with every default filled in, as artifacts and runs record it.

    By the rule of new fields (`pipelines.artifacts`), fields that are None or () are left out unless ALWAYS_RECORDED.
    Sections that the recipe does not have, because its stage needs none, are left out too.
    """
    absent = [section for section, stand_in in ABSENT.items() if getattr(recipe, section) == stand_in]
    content = dataclasses.asdict(recipe)
    if not recipe.encode.gpus_per_worker:
        # This was the default, and recorded as such, before there was one for each kind of device.
        content["encode"]["memory_format"] = recipe.encode.layout
    return _without_unset({name: value for name, value in content.items() if name not in absent})


def _without_unset(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            kept[name] = _without_unset(value, f"{key}.")
        elif (value is not None and value != ()) or key in ALWAYS_RECORDED:
            kept[name] = value
    return kept
