"""Checks of hyper-parameters before training starts."""

from collections.abc import Mapping
from typing import Any

from derain.errors import DerainError
from derain.files.metadata import fits, signature, type_name

POSITIVE = ("learning_rate",)
"""Hyper-parameters that must be greater than 0."""

NOT_NEGATIVE = ("weight_decay", "decay", "warm_up", "hold", "min_learning_rate")
"""Hyper-parameters that must be at least 0."""


def check_hyper_parameters(method: type, hyper_parameters: Mapping[str, Any]) -> None:
    """Check the types and ranges of hyper-parameters.

    Args:
        method: Class of the method, whose ``__init__`` declares the types.
        hyper_parameters: Arguments of ``__init__`` by name. Types of arguments without an annotation are not checked.

    Raises:
        DerainError: If a value is not of the declared type, is not a finite number, or is out of range.

    Example:
        >>> from derain.methods import PReNetModule
        >>> check_hyper_parameters(PReNetModule, {"learning_rate": 0.0})
        Traceback (most recent call last):
        derain.errors.DerainError: --model.learning_rate 0.0: must be greater than 0
    """
    types = signature(method)
    for name, value in hyper_parameters.items():
        expected = types.get(name, Any)
        if not fits(value, expected):
            finite = "a finite " if expected is float else ""
            raise DerainError(f"--model.{name} {value}: expected {finite}{type_name(expected)}")
        is_number = isinstance(value, int | float)
        if is_number and name in POSITIVE and value <= 0:
            raise DerainError(f"--model.{name} {value}: must be greater than 0")
        if is_number and name in NOT_NEGATIVE and value < 0:
            raise DerainError(f"--model.{name} {value}: must be at least 0")
