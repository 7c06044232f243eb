"""A command is read word by word, as its own parser reads it."""

import shlex

import click
import pytest
from test_documented_commands import documented

from pipelines.cli.main import cli
from pipelines.cli.submission.command_line import CommandLine


def parsed(texts, group=cli):
    """What click makes of a command: its parameters, by name."""
    name, *rest = texts
    command = group.get_command(click.Context(group), name)
    return parsed(rest, command) if isinstance(command, click.Group) else command.make_context(name, rest).params


def test_documented_commands_have_the_values_that_their_parsers_find():
    read = 0
    for _, text in documented():
        texts = shlex.split(text, comments=True)
        if len(texts) < 2 or texts[0] == "submit":
            continue
        line, values = CommandLine.read(cli, texts), {}
        assert line.texts == texts
        for word in line.words:
            if word.param is not None and word.param.callback is None:  # a list in one word
                values.setdefault(word.param.name, []).append(word.text)
        expected = {name: value for name, value in parsed(texts).items() if name in values}
        for name, value in expected.items():
            assert values[name] == [str(each) for each in (value if isinstance(value, tuple) else (value,))], text
            read += 1
    assert read > 25


def options(command, names=()):
    """All options of all commands that take a value, with the names of the command before them."""
    if isinstance(command, click.Group):
        return [each for name, below in command.commands.items() for each in options(below, (*names, name))]
    return [(names, param) for param in command.params if isinstance(param, click.Option) and not param.is_flag]


@pytest.mark.parametrize(("names", "option"), options(cli), ids=str)
def test_the_value_of_an_option_is_never_taken_for_the_recipe_or_checkpoint(names, option):
    value, params = value_of(option), cli_command(names).params
    arguments = [param for param in params if isinstance(param, click.Argument)]
    required = [param for param in params if isinstance(param, click.Option) and param.required and param is not option]
    further = [f"{each.opts[0]}={value_of(each)}" for each in required]
    for given in ([option.opts[-1], value], [f"{option.opts[-1]}={value}"]):
        line = CommandLine.read(cli, [*names, *further, *given, *("subject" for _ in arguments)])
        assert line.subject == ("subject" if arguments else None)
        assert [word.text for word in line.words if word.param is option] == [value]


def value_of(option):
    if isinstance(option.type, click.Choice):
        return option.type.choices[0]
    if isinstance(option.type, click.FloatRange) and option.type.max is not None:
        return str(option.type.max)
    return "0.2:0.8" if option.name == "cfg_interval" else "20"


def cli_command(names):
    command = cli
    for name in names:
        command = command.commands[name]
    return command


def test_words_that_may_be_paths_are_found():
    texts = ["evaluate", "a/step_1", "--num-samples=20", "--recipe=b.toml", "--set", "seed=1", "--save-images", "c"]
    command = CommandLine.read(cli, texts)
    assert command.texts == texts
    assert [word.text for word in command.possible_paths] == ["a/step_1", "b.toml", "c"]
    assert (command.recipe, command.subject, command.overrides) == ("b.toml", "a/step_1", ("seed=1",))
    digits = CommandLine.read(cli, ["reference", "build", "digits", "--out", "--r.npz"])
    assert [word.text for word in digits.possible_paths] == ["--r.npz"]


def test_what_a_command_would_refuse_is_refused_when_it_is_read():
    for text, message in {
        "trian x": "found raydit trian, expected one of autoencoder, autoencoders, clean",
        "reference": "found raydit reference, expected one of build",
        "run": "Missing argument",
        "run a.toml --num-sample 3": "No such option",
        "evaluate x --num-samples 3": "3 is not in the range",
    }.items():
        with pytest.raises(click.UsageError) as refused:
            CommandLine.read(cli, shlex.split(text))
        assert message in refused.value.format_message()


def test_what_follows_two_dashes_is_no_flag():
    line = CommandLine.read(cli, ["compare", "--allow-unequal", "--", "--protocol", "a"])
    assert [word.text for word in line.possible_paths] == ["--protocol", "a"]
