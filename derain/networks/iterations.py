"""Numbers of iterations, which the authors' files do not record."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from derain.errors import DerainError

log = logging.getLogger("derain")

MAX_ITERATIONS = 100
"""Limit of the iterations, since files do not bound them and time grows with them."""


def check_iterations(iterations: int, least: int = 1) -> None:
    """Refuse numbers of iterations that a network cannot have.

    Raises:
        DerainError: If there are fewer than ``least`` or more than `MAX_ITERATIONS`.
    """
    if not isinstance(iterations, int) or not least <= iterations <= MAX_ITERATIONS:
        raise DerainError(f"iterations {iterations}: expected an integer from {least} to {MAX_ITERATIONS}")


def assume_iterations(path: Path | None, given: Mapping[str, Any], known: int | None, usual: int) -> dict[str, Any]:
    """Return the number of iterations of an authors' file, as `derain.networks.base.Network.assume` does.

    Args:
        path: The file.
        given: Options that the user gave.
        known: Number that the file's name or folder states.
        usual: Number to assume otherwise, with a warning.

    Example:
        >>> assume_iterations(None, {}, known=4, usual=8), assume_iterations(None, {"iterations": 3}, None, 8)
        ({'iterations': 4}, {'iterations': 3})
    """
    if "iterations" in given:
        return dict(given)
    if known is None:
        log.warning(
            "%s: the file does not record the number of iterations; assuming %d; to change it, use FILE:iterations=N",
            path or "weights",
            usual,
        )
    return {**given, "iterations": known or usual}
