"""What is wrong with a command line, in one line."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable
from pydoc import locate
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


class CommandParser(argparse.ArgumentParser):
    """Parses a command's options; what is wrong is one line, and the usage stays with ``--help``."""

    def error(self, message: str) -> NoReturn:
        """Refuses.

        Raises:
            DerainError: Always.
        """
        raise DerainError(f"{in_one_line(message, self._option_string_actions)}; {self.prog} --help tells the options")


def in_one_line(message: str, known: Iterable[str] = ()) -> str:
    r"""The line that matters of what argparse and jsonargparse say.

    Args:
        message: Of one or many lines.
        known: Options that there are.

    Example:
        >>> in_one_line("Parser key \"data.crop\":\n  Expected a <class 'int'>. Got value: abc")
        '--data.crop abc: must be a whole number'
        >>> in_one_line("unrecognized arguments: --cropp 3", ["--crop"])
        '--cropp: no such option; did you mean --crop?'
    """
    key = "--" + ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    known = list(known)
    for builder in re.findall(r"Problem with given class_path '([\w.]+)'", message)[-1:]:
        known += [f"{key}.{name}" for name in inspect.signature(locate(builder)).parameters]  # type: ignore[arg-type]

    def absent(option: str) -> str:
        near = difflib.get_close_matches(option, known, 1)
        return f"{option}: no such option" + (f"; did you mean {near[0]}?" if near else "")

    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        return absent(f"{key}.{found[1]}")
    if found := re.search(r"does not accept option '([\w.]+)'", message):
        return absent(f"--{found[1]}")
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        return absent(found[1])
    if found := re.search(r"arguments are required: \w+\.(\w+)", message):
        return f"--{found[1]}: is missing; give it, or a --config FILE that has it"
    if found := re.search(r"File does not exist: '(.*)'", message):
        return f"{key} {found[1]}: no such file"
    if found := re.search(r"Expected a dot import path string: (.*)", message):
        return f"{key} {found[1]}: no such class; give the name of one"
    if found := re.search(r"Expected an? (.+)\. Got value: (.*)", message):
        return f"{key} {found[2]}: must be {_kind(found[1])}"
    if found := re.search(r"Given value: (.*)", message):
        value = re.sub(r"^NestedArg\(key='.*', val='(.*)'\)$", r"\1", found[1])
        kinds = dict.fromkeys(_kind(told) for told in re.findall(r"Expected an? (.+)", message))
        return f"{key} {value}: must be {' or '.join(kinds)}"
    line = " ".join(message.split()).replace('"<unicode string>", ', "")
    return line.replace("Problems parsing config", "--config: a file is no YAML")


def _kind(told: str) -> str:
    """What a type is to whoever gives a value of it."""
    if choices := re.search(r"Literal\[(.*)\]", told):
        return f"one of {choices[1].replace(chr(39), '')}"
    name = re.sub(r"<class '(.*)'>", r"\1", told).rsplit(".", 1)[-1]
    return KINDS.get(name, name)
