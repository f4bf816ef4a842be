"""Metadata of weights files, and checks against a schema and the signature of a method."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NoReturn,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from derain.errors import DerainError

MAX_CHARACTERS = 1 << 20
"""Maximum length of the metadata of a file, in characters."""


class Metadata(TypedDict):
    """Metadata of every weights file of derain; a method that writes further keys extends this class.

    Attributes:
        method: Name of the method's class.
        class_path: Import path of the class; missing in files written before version 0.1.
        hyper_parameters: Arguments of ``__init__`` of the class.
        trained_on: Names of the training sets.
        version: Version of derain that wrote the file.
    """

    method: str
    class_path: NotRequired[str]
    hyper_parameters: dict[str, Any]
    trained_on: NotRequired[Sequence[str]]
    version: NotRequired[str | None]


def shorten(text: object, limit: int = 200) -> str:
    r"""Return text from a file as one line of printable characters, for messages.

    Args:
        text: Any object; its string is used.
        limit: Largest number of characters; longer text is cut after as many, and ``…`` is appended.

    Example:
        >>> shorten("conv\n  \x1b[31mweight", 11)
        'conv ?[31mw…'
    """
    line = " ".join(str(text).split())
    printable = "".join(letter if letter.isprintable() else "?" for letter in line[: limit + 1])
    return printable if len(printable) <= limit else f"{printable[:limit]}…"


def parse(path: Path, text: str) -> dict[str, Any]:
    """Parse the ``derain`` entry of a file.

    Args:
        path: The file, for messages.
        text: The entry, as text.

    Returns:
        The metadata; empty if the entry is not a JSON object.

    Raises:
        DerainError: If the entry is too long or too deeply nested, or contains NaN, infinity or a huge integer.
    """
    if len(text) > MAX_CHARACTERS:
        raise DerainError(
            f"{path}: metadata of {len(text):,} characters; expected at most {MAX_CHARACTERS:,}; use another file"
        )
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DerainError(f"{path}: metadata cannot be read ({shorten(error)}); use another file") from error
    return metadata if isinstance(metadata, dict) else {}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def check(path: Path, metadata: Mapping[str, Any], schema: Any, method_class: Any = None) -> None:
    """Check metadata against a schema, and hyper-parameters against the signature of a class.

    Args:
        path: The file, for messages.
        metadata: Entry ``derain`` of the file.
        schema: `Metadata`, or a TypedDict that extends it; values of other keys are not checked.
        method_class: Class whose ``__init__`` accepts the hyper-parameters; by default they are not checked.

    Raises:
        DerainError: If a required key is missing, or a value has another type.
    """
    hints = get_type_hints(schema)
    for name in sorted(schema.__required_keys__ - metadata.keys()):
        raise DerainError(f"{path}: metadata without {name}; use a file that derain wrote")
    for name, value in metadata.items():
        if not fits(value, hints.get(name, Any)):
            raise _type_error(path, name, value, hints[name])
    if method_class is None:
        return
    hints = signature(method_class)
    for name, value in metadata["hyper_parameters"].items():
        if not fits(value, hints.get(name, Any)):
            raise _type_error(path, f"{method_class.__name__}.{name}", value, hints[name])


def _type_error(path: Path, name: str, value: object, expected: Any) -> DerainError:
    return DerainError(
        f"{path}: metadata has {shorten(name, 60)} = {shorten(repr(value), 60)}; expected {type_name(expected)}; use a "
        "file that derain wrote"
    )


def type_name(expected: Any) -> str:
    """Return a type annotation as text for a message.

    Example:
        >>> type_name(float), type_name(Sequence[int] | None)
        ('float', 'Sequence[int] | None')
    """
    name = expected.__name__ if isinstance(expected, type) else str(expected)
    return name.replace("typing.", "").replace("collections.abc.", "")


def signature(method_class: Any) -> dict[str, Any]:
    """Return the types of ``__init__`` arguments by name; empty if an annotation cannot be resolved."""
    try:
        return get_type_hints(method_class.__init__)
    except NameError:  # a user's class with names that are imported only for type checking
        return {}


def fits(value: object, expected: Any) -> bool:
    """Return whether a value that was read from JSON fits a type annotation.

    JSON has no tuples, so lists are accepted as tuples. Integers are accepted as floats. Integers must fit 64 bits, and
    floats must be finite. Values of ``dict`` are not checked; those of a TypedDict are. Types without a counterpart in
    JSON accept any value.

    Example:
        >>> fits([1, 2], Sequence[int]), fits(True, int), fits(float("nan"), float), fits(None, str | None)
        (True, False, False, True)
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if is_typeddict(expected):
        hints = get_type_hints(expected)
        return (
            isinstance(value, dict)
            and expected.__required_keys__ <= value.keys()
            and all(fits(item, hints.get(name, Any)) for name, item in value.items())
        )
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple and Ellipsis not in arguments:
        has_length = isinstance(value, list | tuple) and len(value) == len(arguments)
        return has_length and all(fits(item, kind) for item, kind in zip(value, arguments, strict=True))  # type: ignore[call-overload]
    if origin in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if expected is float:
        return math.isfinite(value) if type(value) is float else fits(value, int)
    if expected is int:
        return type(value) is int and -(1 << 63) <= value < 1 << 63
    return type(value) is expected if expected in (str, bool, NoneType) else True
