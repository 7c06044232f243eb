"""Write the reference pages that the code defines: every field of a recipe, and every command.

    python docs/generate.py        (or `make docs`)

A test compares the pages to what this returns.
"""

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipelines.cli.main import cli
from pipelines.config.recipe import Recipe
from pipelines.config.training import ElasticWorkersConfig, WorkersConfig

REFERENCE = Path(__file__).resolve().parent / "reference"
WORKERS = (ElasticWorkersConfig, WorkersConfig)
"""Classes whose fields several sections have; they are described once."""
BOUNDS = {Ge: ("\u2265", "ge"), Gt: (">", "gt"), Le: ("\u2264", "le"), Lt: ("<", "lt")}
TYPES = {str: "string", int: "integer", float: "number", bool: "true or false"}


def recipe_page() -> str:
    """Return the page of all fields of a recipe, in the order of the dataclasses."""
    parts = [
        "# Fields of a recipe",
        _paragraph(
            "Written by `docs/generate.py` from the dataclasses in `pipelines/config`. A dash means that the field has "
            "no value unless a recipe sets it; the description says what happens then. On the command line, "
            "`--set train.steps=1000` replaces a field, and `--dry-run` shows the resulting recipe."
        ),
        *_section("", Recipe),
        "## Workers",
        _paragraph(
            f"{ElasticWorkersConfig.__doc__} The sections `[autoencoder.train]`, `[encode]`, `[train]` and "
            "`[evaluate]` have these fields; only `[train]` may have a range of workers."
        ),
        _fields_table(ElasticWorkersConfig),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(name: str, config: type) -> Iterator[str]:
    """Yield the heading, description and table of a section, and then those of the sections inside it."""
    yield f"## `[{name}]`" if name else "## At the top"
    yield _paragraph(config.__doc__)
    yield _fields_table(config)
    for each in fields(config):
        if inner := _inner(_hints(config)[each.name]):
            yield from _section(f"{name}.{each.name}".strip("."), inner)


def _fields_table(config: type) -> str:
    shared = set() if config in WORKERS else {each.name for each in fields(ElasticWorkersConfig)}
    hints, texts = _hints(config), _descriptions(config)
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for each in fields(config):
        if each.name in shared or _inner(hints[each.name]):
            continue
        rows.append(_row(f"`{each.name}`", _type_text(hints[each.name]), _default_text(each), texts[each.name]))
    return "\n".join(rows)


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config, include_extras=True)


def _inner(hint: Any) -> type | None:
    """Return the dataclass of a field that is a section of its own."""
    choices = [hint, *typing.get_args(hint)]
    return next((each for each in choices if isinstance(each, type) and is_dataclass(each)), None)


def _paragraph(text: str | None) -> str:
    return textwrap.fill(" ".join(inspect.cleandoc(text or "").split()), 120, break_on_hyphens=False)


def _descriptions(config: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and of the classes that it extends."""
    texts: dict[str, str] = {}
    for each in reversed(config.__mro__):
        if not is_dataclass(each):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return texts


def _type_text(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded_text(_type_text(arguments[0]), arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(each) for each in arguments if each is not types.NoneType)
    if origin is tuple:
        one = _type_text(arguments[0])
        return f"list of: {one}" if arguments[-1] is Ellipsis else f"[{', '.join(map(_type_text, arguments))}]"
    if origin is dict:
        return f"table of: {_type_text(arguments[1])}"
    return TYPES[hint]


def _bounded_text(text: str, conditions: tuple[Any, ...]) -> str:
    bounds = [
        f"{sign} {getattr(condition, name):g}"
        for condition in conditions
        for kind, (sign, name) in BOUNDS.items()
        if isinstance(condition, kind)
    ]
    longer = any(isinstance(condition, MinLen) for condition in conditions)
    return " ".join([*(["non-empty"] if longer else []), text, " and ".join(bounds)]).strip()


def _default_text(field: "Field[Any]") -> str:
    if field.default is MISSING:
        return "required"
    return "\u2013" if field.default is None else f"`{json.dumps(field.default)}`"


def commands_page() -> str:
    """Return the page of all commands, as their --help describes them."""
    parts = [
        "# Commands",
        _paragraph(
            "Written by `docs/generate.py` from the help of the commands. Exit codes: 0 done, 1 failed, 2 bad usage or "
            "input, 130 interrupted, 143 terminated; after the last two the same command continues."
        ),
        *_commands(cli, "raydit"),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _commands(group: click.Group, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        full = f"{path} {name}"
        yield f"## {full}"
        context = click.Context(command, info_name=full)
        yield "```\n" + " ".join([full, *command.collect_usage_pieces(context)]) + "\n```"
        yield inspect.cleandoc(command.help or "").replace("\b\n", "")
        if isinstance(command, click.Group):
            yield from _commands(command, full)
        else:
            yield _options_table(command, context)


def _options_table(command: click.Command, context: click.Context) -> str:
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    rows = [_row(f"`{option}`", text) for option, text in records if text]
    return "\n".join(["| option | |", "|---|---|", *rows]) if rows else ""


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page())


if __name__ == "__main__":
    main()
