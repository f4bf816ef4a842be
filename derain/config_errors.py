"""One-line messages for errors of jsonargparse, whose text is matched against patterns."""

import inspect
import re
from collections.abc import Iterable
from pydoc import locate

from derain.options import unknown_argument

TYPES = {
    "NoneType": "null",
    "list": "a list, such as [a, b]",
    "Sequence": "a list, such as [a, b]",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
}
"""Plain words for types, by the names that jsonargparse prints."""

UNKNOWN_OPTION = re.compile(
    r"Option '(?P<nested>[\w.-]+)' is not accepted"
    r"|does not accept option '(?P<full>[\w.-]+)'"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+)"
)

UNKNOWN_CLASS = "{key} {value}: no such class; expected the name of an importable class"

MESSAGES = {
    r"unrecognized arguments: (?P<value>[^\s=]+)": "unexpected argument {value}; options begin with --",
    r"arguments are required: (fit|validate|test|predict)\.(?P<value>\w+)": (
        "--{value}: is missing; set it, or pass a --config FILE that contains it"
    ),
    r"arguments are required: (?P<value>.*)": "{key} {class_path}: requires {value}; set it",
    r"File does not exist: '(?P<value>.*)'": "{key} {value}: no such file; check the path",
    r"not correspond to a subclass of (?P<base>\w+)[\s\S]*Given value: (\{'class_path': ')?(?P<value>[\w.]+)": (
        "{key} {value}: expected a class that derives from {base}"
    ),
    r"Expected a dot import path string: (?P<value>.*)": UNKNOWN_CLASS,
    r"Expected an? (?P<type>.+)\. Got value: (?P<value>.*)": "{key} {value}: must be {type}",
}
"""Patterns in the text of an error, and the message for each; the first match is used.

``{key}`` is the option with ``--``, ``{class_path}`` the class that the configuration names, and ``{type}`` the group
``type`` in plain words. Other fields are groups of the pattern.
"""


def explain_config_error(text: str, known: Iterable[str] = ()) -> str:
    r"""Return a one-line message for an error of jsonargparse.

    Args:
        text: Text of the error, which may have several lines.
        known: Existing options, with ``--``; for an unknown option, a similar one is suggested if there is one.

    Example:
        >>> explain_config_error("Parser key \"data.crop\":\n  Expected a <class 'int'>. Got value: abc")
        '--data.crop abc: must be a whole number'
    """
    key = _option_of(text)
    class_paths = re.findall(r"Problem with given class_path '([\w.]+)'", text)
    class_path = class_paths[-1] if class_paths else ""
    denied = re.search(r"Importing '([\w.]+)' is not allowed", text)
    if denied:
        return f"{key} {denied[1]}: not allowed: it runs commands or loads code; use a class of Lightning or your own"
    unknown = UNKNOWN_OPTION.search(text)
    if unknown:
        name = unknown["nested"] or unknown["full"] or unknown["argument"]
        is_nested = unknown["nested"] or (class_path and unknown["argument"])
        option = f"{key}.{name}" if is_nested else f"--{name}"
        return unknown_argument(option, [*known, *_class_options(key, class_path)])
    for pattern, template in MESSAGES.items():
        match = re.search(pattern, text)
        if match:
            groups = match.groupdict()
            groups["type"] = _type_name(groups.get("type", ""))
            return template.format(key=key, class_path=class_path, **groups)
    if class_path and not callable(locate(class_path)):
        return UNKNOWN_CLASS.format(key=key, value=class_path)
    return _explain_value(key, text) or _joined(text)


def _option_of(text: str) -> str:
    """Return the option with an error: the joined keys of nested parsers, else the first option, else ``--config``."""
    key = ""
    for part in re.findall(r'Parser key "([\w.]+)"', text):
        key = part if not key or part.startswith(f"{key}.") else f"{key}.{part}"
    if key:
        return f"--{key}"
    option = re.search(r"--[\w.]+", text)
    return option[0] if option else "--config"


def _class_options(key: str, class_path: str) -> list[str]:
    """Return the options that set the parameters of a class; none if the class cannot be imported."""
    configured = locate(class_path) if class_path else None
    if not callable(configured):
        return []
    return [f"{key}.{name}" for name in inspect.signature(configured).parameters]


def _explain_value(key: str, text: str) -> str | None:
    """Return a message about a value that has none of the accepted types; None if the error is of another kind."""
    given = re.search(r"Given value: (.*)", text)
    if not given:
        return None
    nested = re.fullmatch(r"NestedArg\(key='.*', val='(.*)'\)", given[1])
    value = nested[1] if nested else given[1]
    types = dict.fromkeys(_type_name(name) for name in re.findall(r"Expected an? (?!path but)(.+)", text))
    if set(types) - {"null"}:
        return f"{key} {value}: must be {' or '.join(types)}"
    errors = re.search(r"Errors:\s+- ([\s\S]+?)\n\s+- ", text)
    return f"{key}: {_joined(errors[1])}" if errors else None


def _type_name(text: str) -> str:
    """Return the plain words for a type that jsonargparse printed."""
    choices = re.search(r"Literal\[(.*)\]", text)
    if choices:
        return f"one of {choices[1].replace(chr(39), '')}"
    name = re.sub(r"<class '(.*)'>", r"\1", text).rpartition(".")[2]
    return TYPES.get(name, name)


def _joined(text: str) -> str:
    """Return a text of jsonargparse as one line, with phrases that are obscure to users removed or replaced."""
    line = " ".join(text.split()).replace('"<unicode string>", ', "").removesuffix(":")
    return line.replace("Problems parsing config", "--config: not YAML")
