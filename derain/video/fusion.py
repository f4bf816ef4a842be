"""Fuse each derained frame with its neighbours, since rain covers a pixel only for a moment.

Neighbours are aligned by dense optical flow (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV
2016). A pixel of a neighbour is used if flow forwards and backwards cancel, and if the aligned surroundings have about
the same colour and details. The pixels are averaged with weights that fall with the distance from their median, so that
remains of rain and errors of the alignment count little.
"""

from collections.abc import Iterator
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError
from derain.images import Pixels

LARGEST_SIDE = 640
"""Largest longer side, in pixels, of the frames on which flow is computed; larger frames are reduced to it."""

SMALLEST_SIDE = 32
"""Smallest side of frames that can be fused, in pixels."""

SIGMA = 16.0
"""Standard deviation of the weights around the median, in 8-bit levels."""

CUT_AGREEMENT = 0.3
"""Share of the pixels that agree between consecutive frames, below which a new scene begins."""

CUT_DISTANCE = 0.6
"""Bhattacharyya distance of the colour histograms of consecutive frames, above which a new scene begins."""

_MAX_FLOW_ERROR = 4.0  # pixels by which flow forwards and backwards may differ, plus 5 % of its length
_MAX_COLOR_ERROR = 80.0  # 8-bit levels, of blurred frames: remains of heavy rain differ by this much
_MAX_CHROMA_ERROR = 25.0  # the same of R − G and B − G, which rain changes less than objects do
_COLOR_BLUR = 5.0  # σ in pixels
_MAX_DETAIL_RATIO = 3.0  # of local differences to their median: rain remains everywhere, misaligned objects do not
_MIN_DETAIL_ERROR = 4.0  # 8-bit levels that are added to the limit
_DETAIL_BLUR = 3.0  # σ in pixels
_WEIGHTS = np.exp(-(np.arange(256) ** 2) / (2 * SIGMA**2)).astype(np.float32)

Flow = NDArray[np.float32]
Mask = NDArray[np.bool_]


def fuse_neighbours(frames: Iterator[Pixels], reach: int) -> Iterator[Pixels]:
    """Yield frames fused with their neighbours of the same scene.

    Args:
        frames: Derained frames, ``(h, w, 3)`` uint8, of equal size.
        reach: Number of neighbours on each side; 0 yields the frames as they are.

    Yields:
        The fused frames, in order. A frame is yielded once the ``reach`` frames after it, or all frames, have been
        read.

    Raises:
        DerainError: If ``reach`` is above 0 and a side of the frames is shorter than 32 pixels.
    """
    if reach == 0:
        yield from frames
        return
    window = _Window(reach)
    count = 0
    for count, pixels in enumerate(frames, 1):
        window.add(count - 1, pixels)
        if count > reach:
            yield window.fuse(count - 1 - reach)
    for index in range(max(0, count - reach), count):
        yield window.fuse(index)


class _Window:
    """The latest frames, the flows between them, and the scenes that they belong to.

    Args:
        reach: Number of neighbours on each side that a frame is fused with.

    Attributes:
        frames: Frames by index.
        reduced: The same frames, at the size at which flow is computed.
        scenes: Number of the scene of each frame, by index.
        flows: Flow at reduced size from one frame to another, by the indices of both.
    """

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.frames: dict[int, Pixels] = {}
        self.reduced: dict[int, Pixels] = {}
        self.scenes: dict[int, int] = {}
        self.flows: dict[tuple[int, int], Flow] = {}
        self.estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.estimator.setVariationalRefinementAlpha(100.0)  # smoother flow, which does not follow remains of rain
        self.estimator.setVariationalRefinementIterations(10)

    def add(self, index: int, pixels: Pixels) -> None:
        """Add a frame, with its flow to and from the frames of its scene among the ``reach`` before it.

        The frame ``2 reach + 1`` before it is dropped.
        """
        self.frames[index] = pixels
        self.reduced[index] = _reduce(pixels)
        self.scenes[index] = self.scenes.get(index - 1, 0)
        for other in range(index - 1, max(-1, index - 1 - self.reach), -1):
            if self.scenes[other] != self.scenes[index]:
                break
            self.flows[index, other] = self._flow(index, other)
            self.flows[other, index] = self._flow(other, index)
            if other == index - 1 and self._is_cut(other, index):
                self.scenes[index] += 1
                break
        self._drop(index - 2 * self.reach - 1)

    def _flow(self, source: int, target: int) -> Flow:
        """Return the flow from a frame to another one, at reduced size."""
        frames = self.reduced[source], self.reduced[target]
        grey = [cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (0, 0), 1) for frame in frames]
        flow = self.estimator.calc(grey[0], grey[1], None)  # type: ignore[call-overload]
        return cast(Flow, flow)

    def _agreement(self, index: int, other: int) -> Mask:
        """Return where a frame and another one, aligned to it, show the same point, at reduced size."""
        flows = self.flows[index, other], self.flows[other, index]
        return agreement(self.reduced[index], self.reduced[other], *flows)

    def _is_cut(self, before: int, after: int) -> bool:
        """Return whether a new scene begins between two consecutive frames."""
        if histogram_distance(self.reduced[before], self.reduced[after]) > CUT_DISTANCE:
            return True
        return bool(self._agreement(after, before).mean() < CUT_AGREEMENT)

    def _drop(self, index: int) -> None:
        self.frames.pop(index, None)
        self.reduced.pop(index, None)
        for pair in [pair for pair in self.flows if index in pair]:
            del self.flows[pair]
        self.scenes.pop(index, None)

    def fuse(self, index: int) -> Pixels:
        """Return a frame, fused with those of its neighbours that have been added and belong to its scene."""
        current = self.frames[index]
        height, width = current.shape[:2]
        stack, valid = [current], [np.ones((height, width), bool)]
        for other in range(index - self.reach, index + self.reach + 1):
            if other == index or other not in self.frames or self.scenes[other] != self.scenes[index]:
                continue
            small_mask = self._agreement(index, other).astype(np.uint8)
            valid.append(cv2.resize(small_mask, (width, height), interpolation=cv2.INTER_NEAREST) > 0)
            stack.append(warp(self.frames[other], _enlarge(self.flows[index, other], height, width)))
        return fuse_aligned(np.stack(stack), np.stack(valid))


def _reduce(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise DerainError(f"--temporal: frames of {width}×{height} pixels are too small; expected at least 32; omit it")
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    size = (max(SMALLEST_SIDE, round(width * scale)), max(SMALLEST_SIDE, round(height * scale)))
    return pixels if size == (width, height) else cast(Pixels, cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def _enlarge(flow: Flow, height: int, width: int) -> Flow:
    small_height, small_width = flow.shape[:2]
    if (small_height, small_width) == (height, width):
        return flow
    factors = np.array([width / small_width, height / small_height], np.float32)
    return cast(Flow, cv2.resize(flow, (width, height)) * factors)


def _positions(flow: Flow) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    height, width = flow.shape[:2]
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return flow[..., 0] + columns, flow[..., 1] + rows


def warp(image: Pixels, flow: Flow) -> Pixels:
    """Return an image sampled at ``x + flow(x)``, by bicubic interpolation; outside, the border is repeated.

    Args:
        image: ``(h, w, 3)`` uint8.
        flow: ``(h, w, 2)``, horizontal and vertical displacement in pixels.
    """
    return cast(Pixels, cv2.remap(image, *_positions(flow), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))


def agreement(image: Pixels, other: Pixels, flow: Flow, backward: Flow) -> Mask:
    """Return where an image and another one, aligned by flow, show the same point.

    Args:
        image: ``(h, w, 3)`` uint8.
        other: Same shape.
        flow: Flow from ``image`` to ``other``, ``(h, w, 2)``, in pixels.
        backward: Flow from ``other`` to ``image``, same shape.

    Returns:
        ``(h, w)``, true where all four conditions are met: ``x + flow(x)`` is inside the image; ``|flow(x) +
        backward(x + flow(x))|`` is below 4 pixels plus 5 % of the flow's length; the blurred colours differ by less
        than 80 of 255 levels, and their R − G and B − G by less than 25; and the local mean of the absolute difference
        is below three times its median over the image, plus 4 levels.
    """
    height, width = image.shape[:2]
    x, y = _positions(flow)
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    returned = cv2.remap(backward, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    consistent = _length(flow + returned) < _MAX_FLOW_ERROR + 0.05 * _length(flow)
    aligned = warp(other, flow)
    difference = cv2.GaussianBlur(aligned.astype(np.float32) - image, (0, 0), _COLOR_BLUR)
    red, green, blue = cv2.split(difference)
    chroma = np.maximum(np.abs(red - green), np.abs(blue - green))
    same_color = (_largest(np.abs(difference)) < _MAX_COLOR_ERROR) & (chroma < _MAX_CHROMA_ERROR)
    detail = _largest(cv2.absdiff(aligned, image)).astype(np.float32)
    local = cv2.GaussianBlur(detail, (0, 0), _DETAIL_BLUR)
    same_detail = local < _MAX_DETAIL_RATIO * np.median(local) + _MIN_DETAIL_ERROR
    return cast(Mask, inside & consistent & same_color & same_detail)


def fuse_aligned(stack: Pixels, valid: Mask) -> Pixels:
    """Return the robust mean of aligned frames: ``Σ w v / Σ w`` with ``w = valid · exp(−(v − median)² / 2σ²)``.

    The median is that of all frames, with invalid values replaced by those of the first frame. For even ``n``, it is
    the upper of the two middle values. σ is `SIGMA`.

    Args:
        stack: ``(n, h, w, 3)`` uint8; the first is the frame itself.
        valid: ``(n, h, w)``; the first is true everywhere.

    Returns:
        ``(h, w, 3)`` uint8; the median where all valid values are so far from it that their weights vanish.
    """
    filled = np.where(valid[..., None], stack, stack[0])
    median = _median(filled)
    total, weighted = np.zeros(median.shape, np.float32), np.zeros(median.shape, np.float32)
    for pixels, mask in zip(filled, valid, strict=True):
        weights = cv2.LUT(cv2.absdiff(pixels, median), _WEIGHTS) * mask[..., None]
        total += weights
        weighted += weights * pixels
    mean = weighted / np.maximum(total, 1e-30)
    return cast(Pixels, np.rint(np.where(total > 1e-6, mean, median)).astype(np.uint8))


# OpenCV's functions take a fraction of the time of NumPy's reductions over the short axes of frames and channels.


def _median(stack: Pixels) -> Pixels:
    """Return the median over the first axis, the upper of two middle values, by an odd-even transposition sort."""
    ordered: list[Any] = list(stack)
    for start in range(len(ordered)):
        for index in range(start % 2, len(ordered) - 1, 2):
            first, second = ordered[index : index + 2]
            ordered[index : index + 2] = cv2.min(first, second), cv2.max(first, second)
    return cast(Pixels, ordered[len(ordered) // 2])


def _largest(image: NDArray[Any]) -> NDArray[Any]:
    """Return the largest of three channels, ``(h, w)``."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue)


def _length(flow: Flow) -> NDArray[np.float32]:
    """Return the length of a flow, ``(h, w)``."""
    return cast(NDArray[np.float32], cv2.magnitude(*cv2.split(flow)))


def histogram_distance(first: Pixels, second: Pixels) -> float:
    """Return the Bhattacharyya distance of two colour histograms with 8×8×8 bins, from 0 (equal) to 1 (disjoint)."""
    histograms = [cv2.calcHist([image], [0, 1, 2], None, [8] * 3, [0, 256] * 3) for image in (first, second)]
    return float(cv2.compareHist(histograms[0], histograms[1], cv2.HISTCMP_BHATTACHARYYA))
