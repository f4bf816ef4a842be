"""What is wrong with a command line, in one line."""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from derain.errors import DerainError

KINDS = {
    "NoneType": "null",
    "list": "a list, as [a, b]",
    "Sequence": "a list, as [a, b]",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
}


OURS = {
    "optimizer": "--model.learning_rate (derain fit --help METHOD lists all options of a method)",
    "lr_scheduler": "--model.milestones or --model.warm_up, as the method has it",
}
"""What users of LightningCLI look for, and what derain has instead."""


class CommandParser(argparse.ArgumentParser):
    """Parses a command's options; what is wrong is one line, and the usage stays with ``--help``."""

    def error(self, message: str) -> NoReturn:
        """Refuses.

        Raises:
            DerainError: Always.
        """
        surplus = re.match(r"unrecognized arguments: (\S+)", message)
        told = absent(surplus[1], self._option_string_actions) if surplus else message
        raise DerainError(f"{told}; {self.prog} --help tells the options")


def absent(option: str, known: Iterable[str]) -> str:
    """That there is no such option, and which one may have been meant.

    Example:
        >>> absent("--cropp", ["--crop"]), absent("b.jpg", ["--crop"])
        ('--cropp: no such option; did you mean --crop?', "b.jpg: one argument too many; quote globs, as '*.jpg'")
    """
    if not option.startswith("-"):
        return f"{option}: one argument too many; quote globs, as '*.jpg'"
    if (group := option.lstrip("-").partition(".")[0]) in OURS:
        return f"{option}: no such option, since a method brings its own {group.replace('_', ' ')}; set {OURS[group]}"
    from difflib import SequenceMatcher

    def alike(one: str) -> tuple[float, float]:
        """By the last parts of the names, then by all of them."""
        ends = (one.rpartition(".")[2].lstrip("-"), option.rpartition(".")[2].lstrip("-"))
        return SequenceMatcher(None, *ends).ratio(), SequenceMatcher(None, one, option).ratio()

    near = max((one for one in known if not one.endswith(".help")), key=alike, default="")
    return f"{option}: no such option" + (f"; did you mean {near}?" if alike(near)[0] > 0.75 else "")


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """Return arguments without an option and its value, in either form.

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


def in_one_line(message: str, known: Iterable[str] = ()) -> str:
    r"""The line that matters of what jsonargparse says of a configuration.

    Args:
        message: Of one or many lines.
        known: Options that there are.

    Example:
        >>> in_one_line("Parser key \"data.crop\":\n  Expected a <class 'int'>. Got value: abc")
        '--data.crop abc: must be a whole number'
    """
    import inspect
    from pydoc import locate

    key = ""
    for part in re.findall(r'Parser key "([\w.]+)"', message):
        key = part if not key or part.startswith(f"{key}.") else f"{key}.{part}"
    key = f"--{key}" if key else next(iter(re.findall(r"--[\w.]+", message)), "--config")
    classes, options = re.findall(r"Problem with given class_path '([\w.]+)'", message), list(known)
    if classes and callable(built := locate(classes[-1])):
        options += [f"{key}.{name}" for name in inspect.signature(built).parameters]

    def where(pattern: str) -> re.Match[str] | None:
        return re.search(pattern, message)

    if found := where(r"Importing '([\w.]+)' is not allowed"):
        return f"{key} {found[1]}: may not name what runs commands or loads code; name a class of yours or Lightning's"
    if found := where(r"Option '([\w.-]+)' is not accepted"):
        return absent(f"{key}.{found[1]}", options)
    if found := where(r"does not accept option '([\w.-]+)'"):
        return absent(f"--{found[1]}", options)
    if found := where(r"unrecognized arguments: ([^\s=]+)"):
        return absent(f"{key}.{found[1].lstrip('-')}" if classes else found[1], options)
    if found := where(r"arguments are required: (?:fit|validate|test|predict)\.(\w+)"):
        return f"--{found[1]}: is missing; give it, or a --config FILE that has it"
    if found := where(r"arguments are required: (.*)"):
        return f"{key} {classes[-1] if classes else ''}: needs {found[1]}"
    if found := where(r"File does not exist: '(.*)'"):
        return f"{key} {found[1]}: no such file"
    if found := where(r"not correspond to a subclass of (\w+)[\s\S]*Given value: (?:\{'class_path': ')?([\w.]+)"):
        return f"{key} {found[2]}: is no {found[1]}"
    if found := where(r"Expected a dot import path string: (.*)"):
        return f"{key} {found[1]}: no such class; give the name of one"
    if classes and not callable(locate(classes[-1])):
        return f"{key} {classes[-1]}: no such class; give the name of one"
    if found := where(r"Expected an? (.+)\. Got value: (.*)"):
        return f"{key} {found[2]}: must be {_kind(found[1])}"
    if found := where(r"Given value: (.*)"):
        value = re.sub(r"^NestedArg\(key='.*', val='(.*)'\)$", r"\1", found[1])
        kinds = dict.fromkeys(_kind(told) for told in re.findall(r"Expected an? (?!path but)(.+)", message))
        if set(kinds) - {"null"}:
            return f"{key} {value}: must be {' or '.join(kinds)}"
        if found := where(r"Errors:\s+- ([\s\S]+?)\n\s+- "):
            return f"{key}: {' '.join(found[1].split())}"
    line = " ".join(message.split()).replace('"<unicode string>", ', "").removesuffix(":")
    return line.replace("Problems parsing config", "--config: a file is no YAML")


def _kind(told: str) -> str:
    """What a type is to whoever gives a value of it."""
    if choices := re.search(r"Literal\[(.*)\]", told):
        return f"one of {choices[1].replace(chr(39), '')}"
    name = re.sub(r"<class '(.*)'>", r"\1", told).rsplit(".", 1)[-1]
    return KINDS.get(name, name)
