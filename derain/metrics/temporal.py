"""Temporal consistency of videos: flicker, and the warping error of Lai et al.

Lai et al., "Learning Blind Video Temporal Consistency", ECCV 2018, section 4.2: the next frame is warped to the current
one by optical flow, and compared with it where forward and backward flow agree. Here, the flow is that of the clean
frames, computed by dense inverse search (DIS; Kroeger et al., ECCV 2016) instead of FlowNet2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError

from .flicker import flicker

TEMPORAL = "temporal"
"""Name by which ``--protocol`` requests the metrics of this module."""

TEMPORAL_NAMES = ("flicker", "warping_error")
TEMPORAL_DEFINITION = (
    "flicker: mean absolute difference of consecutive frames in 8-bit levels; warping error: mean squared difference, "
    "in [0, 1], between a frame and the next one warped by DIS flow of the clean frames, where forward and backward "
    "flow agree; both of 8-bit RGB output (rounded)"
)
SMALLEST_SIDE = 16
"""Smallest side of frames whose flow can be computed, in pixels."""

Frame = NDArray[np.uint8]
Flow = NDArray[np.float32]
Mask = NDArray[np.bool_]


def split_temporal(names: list[str], *, supported: bool = True) -> tuple[list[str], bool]:
    """Return the protocols of PSNR and SSIM, and whether the temporal metrics are requested.

    Args:
        names: Values of ``--protocol``.
        supported: Whether temporal metrics can be computed.

    Raises:
        DerainError: If the temporal metrics are requested, but not supported, or without another protocol.

    Example:
        >>> split_temporal(["matlab-y", "temporal"])
        (['matlab-y'], True)
    """
    protocols = [name for name in names if name != TEMPORAL]
    requested = len(protocols) < len(names)
    if requested and not supported:
        raise DerainError(f"--protocol {TEMPORAL}: needs derain test, or derain score with clean images; omit it")
    if requested and not protocols:
        raise DerainError(f"--protocol {TEMPORAL}: give a protocol of PSNR and SSIM as well, such as matlab-y")
    return protocols, requested


def temporal_scores(
    clean: tuple[NDArray[Any], NDArray[Any]], videos: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
) -> dict[str, float | None]:
    """Return flicker and warping error of two consecutive frames.

    Args:
        clean: Clean frame and next clean frame, ``(h, w, 3)`` RGB; uint8, or floats that are clipped to [0, 1].
        videos: The same two frames of other videos, such as the derained one, by the prefix of their scores' names.

    Returns:
        ``PREFIXflicker`` and ``PREFIXwarping_error`` of each video, with the prefix ``clean_`` for the clean one; None
        for the warping error if no pixel is visible in both frames.

    Raises:
        DerainError: If shapes differ, or a side is below 16 pixels.
    """
    frames = {prefix: (to_8_bit(before), to_8_bit(after)) for prefix, (before, after) in videos.items()}
    frames["clean_"] = (to_8_bit(clean[0]), to_8_bit(clean[1]))
    shapes = {frame.shape for pair in frames.values() for frame in pair}
    if len(shapes) > 1:
        raise DerainError(f"{TEMPORAL}: consecutive frames must have equal sizes, got shapes {sorted(shapes)}")
    flow, visible = estimate_flow(*frames["clean_"])
    scores: dict[str, float | None] = {}
    for prefix, pair in frames.items():
        scores[f"{prefix}flicker"] = flicker(pair)
        scores[f"{prefix}warping_error"] = warping_error(*pair, flow, visible) if visible.any() else None
    return scores


def temporal_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the definition of the temporal metrics, and the number of pairs of frames without a warping error.

    Args:
        rows: Scores of the frames, with the keys ``name``, ``flicker`` and ``warping_error``. The last two are None for
            a frame that was not compared with the one before it.

    Returns:
        The notes; empty if rows have no ``flicker``.
    """
    if not rows or "flicker" not in rows[0]:
        return []
    compared = [row for row in rows if row["flicker"] is not None]
    missing = [row for row in compared if row["warping_error"] is None]
    notes = [f"{TEMPORAL}: {TEMPORAL_DEFINITION}"]
    if missing:
        notes.append(
            f"{len(missing)} of {len(compared)} pairs of frames have no pixel that is visible in both, and no warping "
            f"error; the first is {missing[0]['name']} and the frame before it"
        )
    return notes


def to_8_bit(image: NDArray[Any]) -> Frame:
    """Return an image in 8 bits: floats are clipped to [0, 1], scaled and rounded."""
    return image if image.dtype == np.uint8 else np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def estimate_flow(before: Frame, after: Frame) -> tuple[Flow, Mask]:
    """Return the flow from a frame to the next one, and the pixels that are visible in both.

    A pixel is visible if it stays inside the image, and ``|f + b|² ≤ 0.01 (|f|² + |b|²) + 0.5``. Here, f is its flow,
    and b the backward flow at the position to which it moves (Sundaram et al., ECCV 2010, as used by Lai et al.).

    Args:
        before: Frame, ``(h, w, 3)`` RGB.
        after: Next frame, same shape.

    Returns:
        Flow, ``(h, w, 2)`` in pixels, x first; visible pixels, ``(h, w)``.

    Raises:
        DerainError: If a side is below 16 pixels.
    """
    if min(before.shape[:2]) < SMALLEST_SIDE:
        raise DerainError(
            f"{TEMPORAL}: frames of {before.shape[1]}x{before.shape[0]} pixels; expected sides of at least "
            f"{SMALLEST_SIDE}; omit --protocol {TEMPORAL}"
        )
    first, second = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after))
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    forwards = estimator.calc(first, second, None)  # type: ignore[call-overload]
    backwards = estimator.calc(second, first, None)  # type: ignore[call-overload]
    return forwards, consistent(forwards, backwards)


def consistent(forwards: Flow, backwards: Flow) -> Mask:
    """Return the pixels that stay inside the image, and whose flows cancel (see `estimate_flow`).

    Args:
        forwards: Flow from a frame to the next one, ``(h, w, 2)`` in pixels, x first.
        backwards: Flow from the next frame to the frame, same shape.

    Returns:
        ``(h, w)``.
    """
    height, width = forwards.shape[:2]
    x, y = _targets(forwards)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    returned = cv2.remap(backwards, x, y, cv2.INTER_LINEAR)
    error = np.square(forwards + returned).sum(axis=2)
    length = np.square(forwards).sum(axis=2) + np.square(returned).sum(axis=2)
    return cast(Mask, inside & (error <= 0.01 * length + 0.5))


def warping_error(before: Frame, after: Frame, flow: Flow, visible: Mask) -> float:
    """Return the mean of ``(I_t − W(I_{t+1}))²`` over visible pixels and channels, with values in [0, 1].

    Args:
        before: Frame I_t, ``(h, w, 3)``.
        after: Next frame I_{t+1}, which W warps to the first one by bilinear interpolation.
        flow: Flow from the first frame to the next one, ``(h, w, 2)`` in pixels, x first.
        visible: Pixels to compare, ``(h, w)``; at least one.
    """
    warped = cv2.remap(after.astype(np.float64), *_targets(flow), cv2.INTER_LINEAR)
    difference = (before.astype(np.float64) - warped)[visible] / 255
    return float(np.square(difference).mean())


def _targets(flow: Flow) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x and y of the positions to which pixels move, ``(h, w)`` each."""
    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    return x + flow[..., 0], y + flow[..., 1]
