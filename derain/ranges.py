"""Check that floating-point images are finite, and in [0, 1] rather than in [0, 255] or [-1, 1]."""

import math
from typing import Any

from derain.errors import DerainError

OVERSHOOT = 0.25
"""Largest accepted distance of values from [0, 1], as after sharpening or bicubic resampling."""


def extremes(values: Any) -> tuple[float, float]:
    """Return the minimum and maximum of an array or tensor: both NaN if a value is NaN, both 0 if it is empty.

    Example:
        >>> import numpy as np
        >>> extremes(np.array([3.0, -1.0])), extremes(np.array([1.0, np.nan]))
        ((-1.0, 3.0), (nan, nan))
    """
    if 0 in values.shape:
        return 0.0, 0.0
    return float(values.min()), float(values.max())


def span(low: float, high: float) -> str:
    """Return the range of values as text for a message.

    Example:
        >>> span(0.0, 255.0), span(float("nan"), float("nan"))
        ('values from 0 to 255', 'NaN')
    """
    return "NaN" if math.isnan(low) or math.isnan(high) else f"values from {low:g} to {high:g}"


def check_finite(values: Any, name: str) -> None:
    """Check that all values of a restored image are finite: in a file, NaN and infinity would become black or white.

    Args:
        values: Array or tensor of any shape.
        name: Name of the image in the message.

    Raises:
        DerainError: If a value is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> check_finite(np.array([0.5, np.inf]), "a.png")
        Traceback (most recent call last):
        derain.errors.DerainError: a.png: has values from 0.5 to inf; expected finite values; use other weights
    """
    low, high = extremes(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DerainError(f"{name}: has {span(low, high)}; expected finite values; use other weights")


def check_range(values: Any, name: str, overshoot: float = OVERSHOOT) -> None:
    """Check that the values of a floating-point image are in [0, 1], up to a small overshoot.

    Args:
        values: Array or tensor of any shape.
        name: Name of the image in the message.
        overshoot: Accepted distance from [0, 1].

    Raises:
        DerainError: If a value is NaN, or further than ``overshoot`` from [0, 1].

    Example:
        >>> import numpy as np
        >>> check_range(np.array([0.0, 255.0]), "clean image")
        Traceback (most recent call last):
        derain.errors.DerainError: clean image: has values from 0 to 255; expected 0 to 1; scale the image
    """
    low, high = extremes(values)
    if not (-overshoot <= low and high <= 1 + overshoot):  # NaN compares false
        raise DerainError(f"{name}: has {span(low, high)}; expected 0 to 1; scale the image")
