"""Means of the scores of frames: for each sequence, and over sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def sequence_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over the frames of each sequence, in order of appearance.

    Args:
        rows: A row for each image, with ``sequence`` (missing or empty for an image that is no frame of a video).

    Returns:
        Rows with ``sequence``, ``frames`` (their number) and the mean of each score.

    Example:
        >>> frames = [{"sequence": "a", "psnr": 20.0}, {"sequence": "a", "psnr": 30.0}, {"sequence": "", "psnr": 1.0}]
        >>> sequence_rows(frames)
        [{'sequence': 'a', 'frames': 2, 'psnr': 25.0}]
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("sequence"):
            groups.setdefault(row["sequence"], []).append(row)
    return [{"sequence": name, "frames": len(group), **mean_row(group)} for name, group in groups.items()]


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each score over rows; rows in which the score is None are ignored.

    Args:
        rows: At least one row; all have the same keys. Scores are floats or None; keys with other values are ignored.

    Returns:
        The means; None for a score that no row has.
    """
    means: dict[str, float | None] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if not all(value is None or isinstance(value, float) for value in values):
            continue
        known = [value for value in values if value is not None]
        means[key] = float(np.mean(known)) if known else None
    return means
