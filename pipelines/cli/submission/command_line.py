"""A raydit command as its words, each known by what the command line declares of it: nothing is listed twice."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import click


@dataclass(frozen=True)
class Word:
    """A word of a command, or the value in --flag=value."""

    text: str
    param: click.Parameter | None = None
    """The argument or option whose value it is; None: a command's name or a flag."""
    prefix: str = ""
    """--flag= before a value."""

    @property
    def is_place(self) -> bool:
        """Whether it may be a path. "digits" are never a folder's, as in a recipe."""
        if self.param is None or (self.param.name == "images" and self.text == "digits"):
            return False
        return isinstance(self.param.type, click.Path)


@dataclass(frozen=True)
class CommandLine:
    """Names of commands first, then options and arguments as they were given."""

    words: tuple[Word, ...]

    @classmethod
    def read(cls, group: click.Group, texts: list[str]) -> "CommandLine":
        """Raises click.UsageError for what the command would refuse."""
        names, found = 0, cast(click.Command, group)
        while isinstance(found, click.Group):
            command = found.get_command(click.Context(found), texts[names]) if names < len(texts) else None
            if command is None:
                known = ", ".join(sorted(found.commands))
                raise click.UsageError(f"found raydit {' '.join(texts[: names + 1])}, expected one of {known}")
            names, found = names + 1, command
        found.make_context(texts[names - 1], texts[names:])
        return cls((*map(Word, texts[:names]), *_values(found, texts[names:])))

    @property
    def name(self) -> str:
        """Of the command."""
        return self.words[0].text

    @property
    def texts(self) -> list[str]:
        return [word.prefix + word.text for word in self.words]

    @property
    def recipe(self) -> str | None:
        """Path of its recipe, where it has one."""
        return next((word.text for word in self.words if _is_recipe(word)), None)

    @property
    def subject(self) -> str | None:
        """Its first argument: a recipe, a checkpoint, images."""
        return next((word.text for word in self.words if isinstance(word.param, click.Argument)), None)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the recipe, as --set gives them."""
        return tuple(word.text for word in self.words if word.param and word.param.name == "overrides")

    @property
    def places(self) -> list[Word]:
        return [word for word in self.words if word.is_place]

    def with_places(self, change: Callable[[str], str]) -> "CommandLine":
        words = (replace(word, text=change(word.text)) if word.is_place else word for word in self.words)
        return CommandLine(tuple(words))

    def with_recipe(self, path: str) -> "CommandLine":
        words = (replace(word, text=path) if _is_recipe(word) else word for word in self.words)
        return CommandLine(tuple(words))


def _is_recipe(word: Word) -> bool:
    return word.param is not None and word.param.name == "recipe"


def _values(command: click.Command, texts: list[str]) -> list[Word]:
    """What a command's own parser makes of the words after its name."""
    options = {name: param for param in command.params if isinstance(param, click.Option) for name in _names(param)}
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    words: list[Word] = []
    expected: click.Option | None = None
    num_arguments, only_arguments = 0, False
    for text in texts:
        flag, equals, value = text.partition("=")
        if expected is not None:
            words.append(Word(text, expected))
            expected = None
        elif text == "--" and not only_arguments:
            words.append(Word(text))
            only_arguments = True
        elif text.startswith("-") and text != "-" and not only_arguments:
            option = options.get(flag)
            words.append(Word(value, option, flag + equals) if equals else Word(text))
            expected = None if equals or option is None or option.is_flag else option
        else:
            words.append(Word(text, arguments[min(num_arguments, len(arguments) - 1)]))
            num_arguments += 1
    return words


def _names(option: click.Option) -> list[str]:
    return [*option.opts, *option.secondary_opts]
