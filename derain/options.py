"""Command-line parsers that are derived from functions, and one-line messages about invalid options."""

import argparse
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from derain.errors import DerainError

METAVARS = {Path: "PATH", int: "N", float: "X"}
"""Placeholders for values in ``--help``, by type."""

RENAMED = {"--output": "--out", "--json": "--format json"}
"""Options of earlier versions, and what replaces them."""

REPLACEMENTS = {
    "optimizer": "--model.learning_rate (derain fit --model.help METHOD lists all options of a method)",
    "lr_scheduler": "--model.milestones or --model.warm_up, depending on the method",
}
"""Option groups of LightningCLI that derain does not have, and what to set instead."""

Command = Callable[..., int]
"""Function of a command or subcommand, which returns the exit code."""


class CommandParser(argparse.ArgumentParser):
    """Parser of a command, derived from a function's signature and Google-style docstring.

    Positional parameters become positional arguments, keyword-only parameters options (``from_`` becomes ``--from``).
    Supported types are ``str``, ``int``, ``float``, ``Path``, ``Literal`` of strings and ``bool`` (a flag, False by
    default), unions of them with None, and sequences of them. A sequence option accepts several values and may be
    repeated. If the function also has a positional sequence, its sequence options accept one value at a time; otherwise
    they would consume the positional values.

    Args:
        prog: Words that call the command, such as ``derain score``.
        function: Function with a Google-style docstring that describes each parameter.

    Example:
        >>> def shout(text: str, *, times: int = 1) -> int:
        ...     '''Print a text in capitals.
        ...
        ...     Args:
        ...         text: Text to print.
        ...         times: Number of repetitions.
        ...     '''
        ...     print(" ".join([text.upper()] * times))
        ...     return 0
        >>> CommandParser("derain shout", shout).parse(["rain", "--times", "2"])
        {'text': 'rain', 'times': 2}
    """

    def __init__(self, prog: str, function: Command) -> None:
        description, descriptions = parse_docstring(function)
        super().__init__(prog, description=_escape(description), argument_default=argparse.SUPPRESS)
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        self._single_value_options = any(
            _is_sequence(parameter.annotation)
            for parameter in parameters
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        )
        for parameter in parameters:
            self._add_parameter(parameter, descriptions[parameter.name])

    def _add_parameter(self, parameter: inspect.Parameter, description: str) -> None:
        settings = _type_settings(parameter.annotation)
        is_sequence = _is_sequence(parameter.annotation)
        default = parameter.default
        has_default = default not in (None, (), inspect.Parameter.empty) and default is not False
        if has_default:
            text = " ".join(default) if isinstance(default, tuple) else default
            description += f" (default: {text})"
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if is_sequence and self._single_value_options:
                settings |= {"nargs": None, "action": "append"}
                description += "; may be repeated"
            name = parameter.name.rstrip("_")
            if settings.get("metavar", "") is None:
                settings["metavar"] = name.upper()
            option = f"--{name.replace('_', '-')}"
            self.add_argument(option, dest=parameter.name, help=_escape(description), **settings)
            return
        settings = {key: value for key, value in settings.items() if key not in {"action", "metavar"}}
        if default is not inspect.Parameter.empty:
            # without an explicit default, argparse would convert the string SUPPRESS by `type`
            settings |= {"nargs": "*" if is_sequence else "?", "default": default}
        self.add_argument(parameter.name, help=_escape(description), **settings)

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of a command line by parameter name, without options that are not given.

        Raises:
            DerainError: If an argument is unknown, missing or invalid.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(unknown_argument(unknown[0], self._known_options()))
        return vars(known)

    def _known_options(self) -> list[str]:
        """Return all options, and each option with each of its choices, such as ``--format json``."""
        options = []
        for name, action in self._option_string_actions.items():
            options += [name, *(f"{name} {choice}" for choice in action.choices or ())]
        return options

    def error(self, message: str) -> NoReturn:
        """Raise DerainError with a one-line message, instead of printing the usage as argparse does.

        Raises:
            DerainError: Always.
        """
        raise DerainError(f"{message}; see {self.prog} --help")


def _is_sequence(annotation: Any) -> bool:
    return get_origin(annotation) is Sequence


def _type_settings(annotation: Any) -> dict[str, Any]:
    """Return the keyword arguments of ``add_argument`` for a type."""
    if get_origin(annotation) in {Union, types.UnionType}:
        annotation = next(member for member in get_args(annotation) if member is not types.NoneType)
    if annotation is bool:
        return {"action": "store_true"}
    if _is_sequence(annotation):
        return {**_type_settings(get_args(annotation)[0]), "nargs": "+", "action": "extend"}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    return {"type": annotation, "metavar": METAVARS.get(annotation)}


def _escape(text: str) -> str:
    """Return a text for the help of argparse: ``%`` is escaped, and double backticks become single."""
    return text.replace("%", "%%").replace("``", "`")


def parse_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the description of a function, and the descriptions of its parameters by name, from its docstring."""
    documentation = inspect.getdoc(function) or ""
    description, _, section = documentation.partition("\n\nArgs:\n")
    descriptions: dict[str, str] = {}
    name = ""
    for line in section.partition("\n\n")[0].splitlines():
        if line.startswith("        "):  # a further line of the same parameter
            descriptions[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            descriptions[name] = text
    return description, {name: text.removesuffix(".") for name, text in descriptions.items()}


def run_command(prog: str, module: types.ModuleType, arguments: Sequence[str]) -> int:
    """Run the function of a command, or of the subcommand that the first argument names.

    Args:
        prog: Words that call the command, such as ``derain data``.
        module: Module of the command, with a function of the same name, or a dictionary ``SUBCOMMANDS`` of functions.
        arguments: Arguments after the command.

    Returns:
        The exit code.

    Raises:
        DerainError: If an argument is unknown, missing or invalid.
    """
    subcommands = getattr(module, "SUBCOMMANDS", None)
    if subcommands is not None and arguments[:1] in (["-h"], ["--help"]):
        print(_subcommands_usage(prog, module, subcommands))
        return 0
    parser, options = find_parser(prog, module, arguments)
    return parser.function(**parser.parse(options))


def find_parser(prog: str, module: types.ModuleType, arguments: Sequence[str]) -> tuple[CommandParser, Sequence[str]]:
    """Return the parser of a command, or of the subcommand named by the first argument, and the remaining arguments.

    Raises:
        DerainError: If the command has subcommands, and the first argument is missing or names none of them.
    """
    subcommands: Mapping[str, Command] | None = getattr(module, "SUBCOMMANDS", None)
    if subcommands is None:
        name = module.__name__.rpartition(".")[2]
        return CommandParser(prog, getattr(module, name)), arguments
    choices = f"choose {', '.join(subcommands)}"
    if not arguments:
        raise DerainError(f"{prog}: SUBCOMMAND is missing; {choices}")
    name = arguments[0]
    if name not in subcommands:
        raise DerainError(f"{prog} {name}: no such subcommand; {choices}")
    return CommandParser(f"{prog} {name}", subcommands[name]), arguments[1:]


def _subcommands_usage(prog: str, module: types.ModuleType, subcommands: Mapping[str, Command]) -> str:
    lines = [f"  {name:<12}{parse_docstring(function)[0].splitlines()[0]}" for name, function in subcommands.items()]
    return "\n".join(
        [
            str(module.__doc__),
            "",
            f"usage: {prog} SUBCOMMAND [options]     ({prog} SUBCOMMAND --help lists the options)",
            "",
            *lines,
        ]
    )


def unknown_argument(argument: str, known: Iterable[str]) -> str:
    """Return a message about an unknown argument; it suggests a similar option if there is one.

    Args:
        argument: The argument.
        known: Existing options, optionally also each option with each of its choices, such as ``--format json``.

    Example:
        >>> unknown_argument("--cropp", ["--crop"])
        '--cropp: no such option; did you mean --crop?'
        >>> unknown_argument("b.jpg", ["--crop"])
        "unexpected argument b.jpg; if it is from a glob, quote the glob, as in '*.jpg'"
    """
    if not argument.startswith("-"):
        return f"unexpected argument {argument}; if it is from a glob, quote the glob, as in '*.jpg'"
    option = argument.partition("=")[0]
    group = option.lstrip("-").partition(".")[0]
    if group in REPLACEMENTS:
        return f"{option}: methods configure their own {group.replace('_', ' ')}; set {REPLACEMENTS[group]}"
    options = list(known)
    renamed = RENAMED.get(option)
    suggestion = renamed if renamed in options else _most_similar(option, options)
    return f"{option}: no such option" + (f"; did you mean {suggestion}?" if suggestion else "")


def _most_similar(option: str, known: Iterable[str]) -> str | None:
    """Return the known option whose part after the last dot is most similar; None if none is similar enough."""
    from difflib import SequenceMatcher

    def last_part(name: str) -> str:
        return name.lstrip("-").rpartition(".")[2]

    def similarity(name: str) -> tuple[float, float]:
        last = SequenceMatcher(None, last_part(name), last_part(option)).ratio()
        return last, SequenceMatcher(None, name, option).ratio()

    candidates = [name for name in known if not name.endswith(".help") and " " not in name]
    best = max(candidates, key=similarity, default=None)
    return best if best is not None and similarity(best)[0] > 0.75 else None


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """Return arguments without an option and its value, written as ``--option value`` or ``--option=value``.

    Example:
        >>> without_option(["fit", "--ckpt_path", "last", "--ckpt_path=last", "--data.crop=64"], "--ckpt_path")
        ['fit', '--data.crop=64']
    """
    kept, is_value = [], False
    for argument in arguments:
        if not is_value and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        is_value = argument == option and not is_value
    return kept
