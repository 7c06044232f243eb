"""Every raydit command that the documents and deployment files show is one that the command line takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from pipelines.cli.main import cli

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "cluster" / "README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "cluster" / "deploy").glob("*.yaml")),
]
COMMANDS = {
    # In a block all of it; in a sentence, which may name a command alone, those with an argument in capitals or a path.
    ".md": re.compile(
        r"(?:^ {4,}(?:\.venv/bin/)?raydit ([^\n]+)|`(?:\.venv/bin/)?raydit ([^`\n]*(?:[A-Z]{2}|/)[^`\n]*)`)",
        re.MULTILINE,
    ),
    ".yaml": re.compile(r"^ *entrypoint: raydit (.+)()", re.MULTILINE),
}


def documented() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), "".join(groups))
        for path in DOCUMENTS
        for groups in COMMANDS[path.suffix].findall(path.read_text())
    ]


def parse(arguments: list[str], group: click.Group = cli) -> None:
    """Parse as the command line does, and run nothing. Raises click.UsageError."""
    name, *rest = arguments
    command = group.get_command(click.Context(group), name)
    if command is None:
        raise click.UsageError(f"no command {name}")
    if isinstance(command, click.Group):
        if rest:
            parse(rest, command)
        return
    context = command.make_context(name, rest)
    if name == "submit":
        parse(list(context.params["command"]))


@pytest.mark.parametrize(("document", "line"), documented(), ids=lambda text: text)
def test_documented_commands_are_taken(document, line):
    parse(shlex.split(line, comments=True))


def test_commands_are_found_in_every_kind_of_document():
    found = {document for document, _ in documented()}
    assert {"README.md", "cluster/README.md", "cluster/deploy/rayjob.yaml"} <= found
    assert len(documented()) > 25


@pytest.mark.parametrize("line", ["trian x", "submit --pakc -- run x", "submit -- train", "export a b --format onnx"])
def test_a_command_that_would_be_refused_is_noticed(line):
    with pytest.raises(click.UsageError):
        parse(shlex.split(line))


def test_the_page_on_security_names_only_files_that_exist():
    page = ROOT / "docs" / "explanation" / "security.md"
    named = re.findall(r"`((?:cluster|dit|pipelines|evaluation|raydit)/[\w./-]+)`", page.read_text())
    linked = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    assert named and all((ROOT / name).exists() for name in named)
    assert linked and all((page.parent / link).resolve().is_file() for link in linked)
