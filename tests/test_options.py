import dataclasses
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest

from derain.cli import COMMANDS
from derain.commands.data import synthesize_set
from derain.commands.restore import restore
from derain.commands.route import route
from derain.commands.score import score
from derain.data.rain import PRESETS, Rain
from derain.errors import DerainError
from derain.methods.cliprpn.prompts import PROMPTS
from derain.methods.daclipsde.solvers import SOLVERS
from derain.metrics.protocols import PROTOCOL_GROUPS, PROTOCOLS
from derain.options import RENAMED, CommandParser, find_parser, parse_docstring


def command(
    source: str,
    target: Path | None = None,
    *,
    form: Literal["text", "json"] = "text",
    steps: int | None = None,
    max_size: float = 1.5,
    names: Sequence[str] = ("a", "b"),
    overwrite: bool = False,
) -> int:
    """Do something.

    Args:
        source: Input, 100 %.
        target: Output.
        form: Form
            of the output.
        steps: Steps.
        max_size: Largest size.
        names: Names.
        overwrite: Overwrite.

    Raises:
        DerainError: Never.
    """
    return 0


def command_of_files(files: Sequence[Path] = (), *, method: Sequence[str] = ()) -> int:
    """Do something with files.

    Args:
        files: Files.
        method: Methods.
    """
    return 0


PARSER = CommandParser("derain command", command)
PARSER_OF_FILES = CommandParser("derain files", command_of_files)


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("in", {"source": "in", "target": None}),
        ("in out", {"source": "in", "target": Path("out")}),
        ("in out --form json --steps 3", {"source": "in", "target": Path("out"), "form": "json", "steps": 3}),
        ("in out --max-size=2", {"source": "in", "target": Path("out"), "max_size": 2.0}),
        ("in out --names x y --names z", {"source": "in", "target": Path("out"), "names": ["x", "y", "z"]}),
        ("in out --overwrite", {"source": "in", "target": Path("out"), "overwrite": True}),
    ],
)
def test_arguments_have_the_types_of_the_signature(line, arguments):
    assert PARSER.parse(line.split()) == arguments


def test_help_is_the_docstring():
    text = " ".join(PARSER.format_help().split())
    for part in (
        "Do something.",
        "Input, 100 %",
        "Form of the output (default: text)",
        "(default: 1.5)",
        "(default: a b)",
    ):
        assert part in text
    assert "Never" not in text


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("", "source"),
        ("in out more", "more"),
        ("in --sizes 3", "--sizes"),
        ("in --max_size 3", "--max-size?"),
        ("in --steps x", "'x'"),
        ("in --form xml", "'xml'"),
        ("in --names", "--names"),
    ],
)
def test_wrong_arguments_are_refused(line, value):
    with pytest.raises(DerainError, match=value.replace("?", r"\?")):
        PARSER.parse(line.split())


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("a b", {"files": [Path("a"), Path("b")]}),
        ("--method m a b", {"files": [Path("a"), Path("b")], "method": ["m"]}),
        ("a --method m --method n", {"files": [Path("a")], "method": ["m", "n"]}),
        ("--method m", {"files": (), "method": ["m"]}),
    ],
)
def test_options_do_not_take_the_values_of_a_positional_sequence(line, arguments):
    assert PARSER_OF_FILES.parse(line.split()) == arguments


def all_parsers():
    """Yield the parser of each command and subcommand."""
    for name in COMMANDS:
        module = importlib.import_module(f"derain.commands.{name}")
        for subcommand in getattr(module, "SUBCOMMANDS", {name: None}):
            yield find_parser(f"derain {name}", module, [subcommand])[0]


def required_arguments(parser):
    """Return a value for each required positional argument."""
    positional = [action for action in parser._actions if not action.option_strings and action.required]
    return [next(iter(action.choices or ["1"])) for action in positional]


def test_renamed_options_are_suggested_where_the_new_name_exists():
    suggested = set()
    for parser in all_parsers():
        for old in RENAMED:
            with pytest.raises(DerainError, match=old) as raised:
                parser.parse([*required_arguments(parser), old])
            suggestion = re.search(r"did you mean (\S+)(?: (\S+))?\?", str(raised.value))
            if suggestion:
                option, choice = suggestion.groups()
                action = parser._option_string_actions[option]
                assert choice is None or choice in action.choices
                suggested.add(old)
    assert suggested == set(RENAMED)


def help_of(function, parameter):
    """Return the help of an option."""
    return parse_docstring(function)[1][parameter]


def attribute_help(described, name):
    """Return the description of an attribute in the docstring of a class."""
    section = inspect.getdoc(described).partition("Attributes:\n")[2].partition("\n\n")[0]
    joined = re.sub(r"\n {8,}", " ", section)
    return re.search(rf"^ *{name}: (.*?)\.?$", joined, re.MULTILINE)[1]


def test_help_of_protocols_lists_all():
    names = help_of(score, "protocol").partition(": ")[2].partition(";")[0]
    listed, _, groups = names.partition(", or ")
    assert listed.split(", ") == list(PROTOCOLS)
    assert groups == "; ".join(f"{name} for {' and '.join(members)}" for name, members in PROTOCOL_GROUPS.items())


def test_help_of_prompts_lists_all():
    assert re.search(r"\((.*?)\)", help_of(route, "prompts"))[1].split(", ") == list(PROMPTS)


def test_help_of_solvers_lists_all():
    names = help_of(restore, "solver").partition(": ")[2].replace(" (default)", "")
    assert set(re.split(", | or ", names)) == set(SOLVERS)


def test_help_of_rain_has_its_limits():
    assert get_args(get_type_hints(synthesize_set)["preset"]) == tuple(PRESETS)
    for parameter in dataclasses.fields(Rain):
        low, high = parameter.metadata["limits"]
        for documentation in (parse_docstring(synthesize_set)[1][parameter.name], attribute_help(Rain, parameter.name)):
            assert re.search(rf"[ ;]{re.escape(str(low))} to {re.escape(str(high))}$", documentation)
