"""Suffixes and containers of video files; size, rotation and colours of a video."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv"}
)
"""Suffixes of videos, in lower case."""

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Containers that can be written, by suffix; they store the time of every frame."""

MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""Numbers of colour matrices in PyAV's conversions, by their numbers in videos (ISO/IEC 23091-2)."""

UNSPECIFIED = 2
"""Number of an unknown colour matrix in videos."""

UNKNOWN_MATRICES = frozenset({0, UNSPECIFIED, 3})
"""Numbers in videos that name no colour matrix: RGB, unspecified, reserved."""

LIMITED, FULL = 1, 2
"""Values of the tag of the colour range: luma from 16 to 235, or from 0 to 255."""


def output_path(path: Path) -> Path:
    """Return the path with the suffix of the restored file: ``.mp4`` for videos whose container cannot be written.

    Example:
        >>> [output_path(Path(name)).name for name in ("a.mts", "b.mkv", "c.jpg")]
        ['a.mp4', 'b.mkv', 'c.jpg']
    """
    suffix = path.suffix.lower()
    return path.with_suffix(".mp4") if suffix in SUFFIXES and suffix not in FORMATS else path


class VideoFormat(NamedTuple):
    """Size, rotation and colours of a video.

    Attributes:
        height: Height of the upright frames.
        width: Width of the upright frames.
        mirrored: Whether frames must be mirrored from left to right, before the quarter turns, to be upright.
        quarter_turns: Number of quarter turns counter-clockwise, 0 to 3, that make frames upright.
        matrix: Colour matrix for the conversion to and from RGB, a key of `MATRICES`.
        full_range: Whether luma is from 0 to 255 instead of 16 to 235.
        color_tags: Tags for the copy: colour matrix, range, transfer function and primaries. If the source does not
            name its matrix, the first tag is `UNSPECIFIED`.
        aspect: Width of an upright pixel divided by its height.
        bits: Bits per channel.
        has_alpha: Whether frames have an alpha channel.
        interlaced: Whether odd and even lines show different times.
    """

    height: int
    width: int
    mirrored: bool
    quarter_turns: int
    matrix: int
    full_range: bool
    color_tags: tuple[int, int, int, int]
    aspect: Fraction
    bits: int
    has_alpha: bool
    interlaced: bool


def accurate_interpolation() -> Any:
    """Return PyAV's flags for bicubic interpolation, full-resolution chroma and exact rounding."""
    from av.video.reformatter import Interpolation

    accurate = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    return Interpolation.BICUBIC | accurate


def reason(error: Any) -> str:
    """Return the short message of an FFmpeg error."""
    return str(error.strerror or type(error).__name__)


def rotation_of(display_matrix: Sequence[int]) -> tuple[bool, int] | None:
    """Return the rotation of a display matrix: whether to mirror first, and quarter turns counter-clockwise.

    Args:
        display_matrix: Nine numbers, row by row, in 16.16 fixed point: ``x' = x m0 + y m3``, ``y' = x m1 + y m4``, with
            y downwards.

    Returns:
        Whether to mirror from left to right, and the number of quarter turns, 0 to 3; None if the rotation is not a
        multiple of 90°.

    Example:
        >>> rotation_of([0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30])
        (False, 1)
    """
    a, b, _, c, d, *_ = display_matrix
    mirrored = a * d - b * c < 0
    length = math.hypot(a, b) or 1.0
    if mirrored:
        length = -length
    direction = (round(a / length, 2), round(b / length, 2))
    quarter_turns = {(1.0, 0.0): 0, (0.0, -1.0): 1, (-1.0, 0.0): 2, (0.0, 1.0): 3}.get(direction)
    return None if quarter_turns is None else (mirrored, quarter_turns)
