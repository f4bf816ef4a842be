"""Flicker of videos."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError


def flicker(frames: Iterable[NDArray[Any]]) -> float:
    """Return the mean absolute difference of consecutive frames, ``mean |I_{t+1} − I_t|``, in 8-bit levels.

    In a static scene, every change is flicker. With motion, compare the result with that of the clean video.

    Args:
        frames: At least two frames of equal shape; uint8, or floats in [0, 1]. An iterator may produce them one by one:
            only two are kept in memory.

    Raises:
        DerainError: If there are fewer than two frames, or shapes differ.

    Example:
        >>> flicker([np.full((2, 2, 3), value, np.uint8) for value in (10, 13, 12)])
        2.0
    """
    differences = []
    for before, after in pairwise(frames):
        if before.shape != after.shape:
            raise DerainError(f"flicker: frames of shapes {before.shape} and {after.shape}; expected equal shapes")
        scale = 1 if after.dtype == np.uint8 else 255
        differences.append(np.abs(after.astype(np.float64) - before.astype(np.float64)).mean() * scale)
    if not differences:
        raise DerainError("flicker: fewer than 2 frames; expected at least 2")
    return float(np.mean(differences))
