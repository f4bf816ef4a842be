"""Number of iterations of recurrent networks, which the authors' files do not record."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from derain.errors import DerainError

log = logging.getLogger("derain")

MAX_ITERATIONS = 100
"""Maximum number of iterations: run time grows with them, and even a small weights file could ask for any number."""


def check_iterations(iterations: int, minimum: int = 1) -> None:
    """Check a number of iterations.

    Raises:
        DerainError: If it is not an integer from ``minimum`` to `MAX_ITERATIONS`.
    """
    if not isinstance(iterations, int) or not minimum <= iterations <= MAX_ITERATIONS:
        raise DerainError(f"iterations {iterations}: expected an integer from {minimum} to {MAX_ITERATIONS}")


def assume_iterations(path: Path | None, given: Mapping[str, Any], known: int | None, default: int) -> dict[str, Any]:
    """Return options with ``iterations`` for an authors' file; see `derain.networks.base.Network.assume`.

    Args:
        path: The file; None if unknown.
        given: Options that the user gave.
        known: Number that the file's name or folder determines, if any.
        default: Number to assume otherwise, with a warning.

    Example:
        >>> assume_iterations(None, {}, known=4, default=8), assume_iterations(None, {"iterations": 3}, None, 8)
        ({'iterations': 4}, {'iterations': 3})
    """
    if "iterations" in given:
        return dict(given)
    if known is None:
        log.warning(
            "%s: the file does not record the number of iterations; assuming %d; to change it, use FILE:iterations=N",
            path or "weights",
            default,
        )
    return {**given, "iterations": known or default}
