"""A raydit command split into words, each with the parameter that it is a value of, as the commands declare them."""

from dataclasses import dataclass, replace
from typing import cast

import click


@dataclass(frozen=True)
class Word:
    """A word of a command, or the value in --flag=value."""

    text: str
    """The word itself."""
    param: click.Parameter | None = None
    """The argument or option that has this value; None for a command's name and for a flag."""
    prefix: str = ""
    """"--flag=" in front of a value."""

    @property
    def may_be_path(self) -> bool:
        """Whether the word may be a path. "digits" as images never is, even if there is a folder of that name."""
        if self.param is None or (self.param.name == "images" and self.text == "digits"):
            return False
        return isinstance(self.param.type, click.Path)


@dataclass(frozen=True)
class CommandLine:
    """The words of a command: first the names of the command, then options and arguments in the given order."""

    words: tuple[Word, ...]

    @classmethod
    def read(cls, group: click.Group, texts: list[str]) -> "CommandLine":
        """Read the words of a command of `group`. Raises click.UsageError where the command would."""
        num_names, found = 0, cast(click.Command, group)
        while isinstance(found, click.Group):
            command = found.get_command(click.Context(found), texts[num_names]) if num_names < len(texts) else None
            if command is None:
                known = ", ".join(sorted(found.commands))
                raise click.UsageError(f"found raydit {' '.join(texts[: num_names + 1])}, expected one of {known}")
            num_names, found = num_names + 1, command
        found.make_context(texts[num_names - 1], texts[num_names:])
        return cls((*map(Word, texts[:num_names]), *_read_values(found, texts[num_names:])))

    @property
    def name(self) -> str:
        """Name of the command, or of its group."""
        return self.words[0].text

    @property
    def texts(self) -> list[str]:
        """The words as they are typed."""
        return [word.prefix + word.text for word in self.words]

    @property
    def recipe(self) -> str | None:
        """Path of the command's recipe, if it has one."""
        return next((word.text for word in self.words if _is_recipe(word)), None)

    @property
    def subject(self) -> str | None:
        """First argument, if there is one: a recipe, a checkpoint, images."""
        return next((word.text for word in self.words if isinstance(word.param, click.Argument)), None)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides of the recipe, the values of --set."""
        return tuple(word.text for word in self.words if word.param and word.param.name == "overrides")

    @property
    def possible_paths(self) -> list[Word]:
        """Words that may be paths."""
        return [word for word in self.words if word.may_be_path]

    def with_recipe(self, path: str) -> "CommandLine":
        """Return the command with another path of its recipe."""
        words = (replace(word, text=path) if _is_recipe(word) else word for word in self.words)
        return CommandLine(tuple(words))


def _is_recipe(word: Word) -> bool:
    return word.param is not None and word.param.name == "recipe"


def _read_values(command: click.Command, texts: list[str]) -> list[Word]:
    """Assign the words after a command's name to its parameters, as the command's own parser does."""
    options = {name: param for param in command.params if isinstance(param, click.Option) for name in _names(param)}
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    words: list[Word] = []
    positions: list[int] = []
    expected: click.Option | None = None
    only_arguments = False
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
            positions.append(len(words))
            words.append(Word(text))
    for position, argument in zip(positions, _spread(arguments, len(positions)), strict=True):
        words[position] = replace(words[position], param=argument)
    return words


def _spread(arguments: list[click.Argument], count: int) -> list[click.Argument]:
    """Return which argument each of `count` words belongs to; one that takes any number gets what the others leave.

    Arguments at the end that are left out belong to no word.
    """
    spare = count - sum(argument.nargs == 1 for argument in arguments)
    return [argument for argument in arguments for _ in range(1 if argument.nargs == 1 else spare)][:count]


def _names(option: click.Option) -> list[str]:
    return [*option.opts, *option.secondary_opts]
