"""Which images show the same background: copied, cropped, flipped, turned, resized, re-encoded, rained on.

Candidates come from thumbnails of whole images and from local features (SIFT, Lowe, IJCV 2004) whose
positions agree on one flip or quarter turn, scale and shift. Only what then agrees pixel by pixel is a match:
two photos of one place, taken a step or a second apart, are none.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.images import Pixels

FORMAT = 1
"""To be raised when other images would count as the same background."""

_SEARCH_SIDE = 400  # longest side at which features are sought
_COMPARE_SIDE = 256  # longest side at which pixels are compared
_FEATURES = 150  # strongest features kept of an image
_NEIGHBOURS = 8
_FEATURE_DISTANCE = 250  # of SIFT descriptors; copies lie below, most strangers above
_THUMBNAIL = 16
_SURE = 0.998  # agreement that refining could hardly raise
_COPY = 0.99  # least agreement of copies
_RAINY = 0.9  # least agreement where rain lies on one of the two

Floats = NDArray[np.float64]
Grey = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Signature:
    """What is kept of an image to recognise it.

    Attributes:
        grey: The image, its longest side at most 256, ``(h, w)`` in 0 to 255.
        points: Features: x, y in ``grey`` and their angle in degrees, ``(n, 3)``.
        descriptors: What they look like, ``(n, 128)``.
        rainy: Whether the image has rain on it.
    """

    grey: NDArray[np.uint8]
    points: NDArray[np.float32]
    descriptors: NDArray[np.uint8]
    rainy: bool = False


@dataclass(frozen=True)
class BackgroundMatch:
    """Two images of the same background.

    Attributes:
        first: Index of the one image.
        second: Index of the other.
        score: Agreement of their gradients where they overlap, at most 1.
        mirrored: Whether one is the mirror image of the other.
        turn: Degrees clockwise that the first is turned by, after having been turned upside down if mirrored.
        share: Share of the first image's area that the second shows.
        of_second: Share of the second image's area that the first shows.
    """

    first: int
    second: int
    score: float
    mirrored: bool
    turn: int
    share: float
    of_second: float

    def __str__(self) -> str:
        """What was done to the image, in words.

        Example:
            >>> str(BackgroundMatch(0, 1, 1.0, True, 180, 1.0, 1.0))
            'flipped left to right'
        """
        flips = {0: "flipped upside down", 90: "transposed", 180: "flipped left to right", 270: "transposed"}
        words = [flips[self.turn]] if self.mirrored else [f"turned by {self.turn}°"] * bool(self.turn)
        if min(self.share, self.of_second) < 0.97:
            words.append(f"cropped to {min(self.share, self.of_second):.0%} of its area")
        return ", ".join(words) or "whole"


def compute_signature(pixels: Pixels, *, rainy: bool = False, local: bool = True) -> Signature:
    """Keeps of an image what recognises it.

    Args:
        pixels: ``(h, w, 3)`` in 0 to 255.
        rainy: Whether rain lies on it; thin bright streaks are then weakened first.
        local: Whether to look for features, without which cropped images are not recognised.
    """
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    if rainy:
        grey = np.asarray(cv2.morphologyEx(grey, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), np.uint8)
    small = _shrunk(grey, _COMPARE_SIDE)
    points, descriptors = np.zeros((0, 3), np.float32), np.zeros((0, 128), np.uint8)
    if local:
        search = _shrunk(grey, _SEARCH_SIDE)
        found, described = cv2.SIFT.create(nfeatures=_FEATURES).detectAndCompute(search, None)
        if described is not None:
            strongest = np.argsort([-point.response for point in found], kind="stable")[:_FEATURES]
            scale = small.shape[1] / search.shape[1]
            points = np.array(
                [(found[i].pt[0] * scale, found[i].pt[1] * scale, found[i].angle) for i in strongest],
                np.float32,
            )
            descriptors = described[strongest].astype(np.uint8)
    return Signature(small, points, descriptors, rainy)


def _shrunk(grey: Grey, side: int) -> Grey:
    scale = side / max(grey.shape)
    if scale >= 1:
        return grey
    size = [max(1, round(length * scale)) for length in grey.shape[::-1]]
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)


def find_matches(
    first: Sequence[Signature], second: Sequence[Signature] | None = None, *, crops: bool = True
) -> list[BackgroundMatch]:
    """Finds images of the same background.

    Args:
        first: Some images.
        second: Others to compare each of them with; by default each of ``first`` with every later one.
        crops: Whether to look for parts of images too, which takes features.

    Returns:
        One match for every pair of images that has one, sorted by the images' indices.
    """
    images = [*first, *(second or ())]
    best: dict[tuple[int, int], BackgroundMatch] = {}
    searches = [_by_thumbnail, _by_features] if crops else [_by_thumbnail]
    for search in searches if len(images) > 1 else []:
        wanted = [
            guess
            for guess in search(images)
            if (guess.first, guess.second) not in best
            and (second is None or (guess.first < len(first)) != (guess.second < len(first)))
        ]
        with ThreadPoolExecutor() as threads:
            for match in threads.map(lambda guess: _confirmed(images, guess), wanted):
                if match is not None:
                    key = (match.first, match.second)
                    best[key] = max(match, best.get(key, match), key=lambda one: one.score)
    if second is None:
        return [best[key] for key in sorted(best)]
    shift = len(first)
    return [
        BackgroundMatch(a, b - shift, m.score, m.mirrored, m.turn, m.share, m.of_second)
        for (a, b), m in sorted(best.items())
    ]


@dataclass(frozen=True)
class _Hypothesis:
    """The first image, flipped upside down and turned, lies in the second at ``scale * xy + shift``."""

    first: int
    second: int
    mirrored: bool
    turns: int
    scale: tuple[float, float]
    shift: tuple[float, float]
    votes: int


def _oriented(image: Grey, mirrored: bool, turns: int) -> Grey:
    return np.ascontiguousarray(np.rot90(image[::-1] if mirrored else image, -turns))


def _oriented_points(points: Floats, shape: tuple[int, ...], mirrored: bool, turns: int) -> Floats:
    """Where points ``(n, 2)`` of an image of that shape lie once it is flipped and turned."""
    x, y = points[:, 0], points[:, 1]
    h, w = shape[:2]
    if mirrored:
        y = h - 1 - y
    for _ in range(turns):
        x, y, h, w = h - 1 - y, x, w, h
    return np.stack([x, y], 1)


def _by_thumbnail(images: Sequence[Signature]) -> list[_Hypothesis]:
    """Whole images that look alike when small, in any of the eight orientations."""
    size = (_THUMBNAIL, _THUMBNAIL)
    small = [np.asarray(cv2.resize(image.grey, size, interpolation=cv2.INTER_AREA), np.uint8) for image in images]
    right = _standardised(small)
    hypotheses = []
    for mirrored in (False, True):
        for turns in range(4):
            left = _standardised([_oriented(image, mirrored, turns) for image in small])
            for start in range(0, len(images), 1024):
                alike = left[start : start + 1024] @ right.T > 0.96
                for a, b in zip(*np.nonzero(alike), strict=True):
                    if start + a < b:
                        hypotheses.append(_whole(images, start + int(a), int(b), mirrored, turns))
    return hypotheses


def _standardised(thumbnails: Sequence[Grey]) -> NDArray[np.float32]:
    flat = np.stack(thumbnails).reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), np.float32)


def _whole(images: Sequence[Signature], first: int, second: int, mirrored: bool, turns: int) -> _Hypothesis:
    h, w = images[first].grey.shape[:: -1 if turns % 2 else 1]
    to_h, to_w = images[second].grey.shape
    scale = (to_w / w, to_h / h)
    return _Hypothesis(first, second, mirrored, turns, scale, ((scale[0] - 1) / 2, (scale[1] - 1) / 2), _FEATURES)


def _by_features(images: Sequence[Signature]) -> list[_Hypothesis]:
    """Images whose features agree on an orientation, scale and shift."""
    if not any(len(image.points) for image in images):
        return []
    descriptors = np.concatenate([image.descriptors for image in images]).astype(np.float32)
    points = np.concatenate([image.points for image in images]).astype(np.float64)
    owner = np.repeat(np.arange(len(images)), [len(image.points) for image in images])
    cv2.setRNGSeed(0)
    index = cv2.flann.Index(descriptors, {"algorithm": 1, "trees": 4})
    votes = []
    for mirrored in (False, True):
        queries = _mirrored_descriptors(descriptors) if mirrored else descriptors
        votes.append(_votes(index, queries, points[:, 2], owner, mirrored))
    table = np.concatenate(votes)
    table = table[np.lexsort(table.T[::-1])]
    new = (np.diff(table[:, :4], axis=0, prepend=-1) != 0).any(1)
    starts = [*np.flatnonzero(new).tolist(), len(table)]
    hypotheses = []
    for start, end in pairwise(starts):
        if end - start < 3:
            continue
        group = table[start:end]
        first, second, flipped, turns = (int(value) for value in group[0, :4])
        group = group[np.argsort(group[:, 6], kind="stable")[:40]]
        a = _oriented_points(points[group[:, 4], :2], images[first].grey.shape, bool(flipped), turns)
        fit = _fit(a, points[group[:, 5], :2])
        if fit is not None:
            hypotheses.append(_Hypothesis(first, second, bool(flipped), turns, *fit))
    return hypotheses


def _mirrored_descriptors(descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
    """SIFT descriptors of the mirror image: 4 x 4 cells of 8 directions, rows and directions reversed."""
    cells = descriptors.reshape(-1, 4, 4, 8)[:, ::-1][..., -np.arange(8) % 8]
    return np.ascontiguousarray(cells.reshape(-1, 128))


def _votes(
    index: "cv2.flann.Index",
    queries: NDArray[np.float32],
    angles: Floats,
    owner: NDArray[np.int64],
    mirrored: bool,
) -> NDArray[np.int64]:
    """Pairs of like features: both images, mirrored, quarter turns, both features, distance."""
    parts = [part for part in np.array_split(queries, 8) if len(part)]
    count = min(_NEIGHBOURS, len(queries))
    with ThreadPoolExecutor() as threads:
        found = [*threads.map(lambda part: index.knnSearch(part, count, params={"checks": 32}), parts)]
    b = np.concatenate([ids for ids, _ in found]).astype(np.int64).ravel()
    distance = np.sqrt(np.concatenate([squares for _, squares in found])).ravel()
    a = np.repeat(np.arange(len(queries)), count)
    turned = angles[b] + (angles[a] if mirrored else -angles[a])
    turns = np.rint(turned / 90).astype(np.int64)
    ok = (owner[a] != owner[b]) & (distance < _FEATURE_DISTANCE) & (np.abs(turned - 90 * turns) < 12)
    a, b, turns, distance = a[ok], b[ok], turns[ok] % 4, distance[ok]
    later = owner[a] > owner[b]  # state every pair from its earlier image: invert the orientation
    turns = np.where(later & (not mirrored), -turns % 4, turns)
    a, b = np.where(later, b, a), np.where(later, a, b)
    table = [owner[a], owner[b], np.full(len(a), mirrored), turns, a, b, distance.astype(np.int64)]
    return np.unique(np.stack(table, 1).astype(np.int64), axis=0)


def _fit(a: Floats, b: Floats) -> tuple[tuple[float, float], tuple[float, float], int] | None:
    """Scale and shift by axis that take most points ``a`` to ``b``, over all pairs of points.

    Returns:
        Scale, shift and the number of points that agree; None if fewer than three do.
    """
    i, j = np.triu_indices(len(a), 1)
    run, rise = a[i] - a[j], b[i] - b[j]
    far = (np.abs(run) > 5).all(1) & (np.abs(rise) > 2).all(1)
    i, run, rise = i[far], run[far], rise[far]
    scale = rise / run
    bounded = np.clip(scale, 0.1, 10)
    ratio = bounded[:, 0] / bounded[:, 1]
    sane = (scale == bounded).all(1) & (ratio > 1 / 1.8) & (ratio < 1.8)
    if not sane.any():
        return None
    scale, i = scale[sane], i[sane]
    shift = b[i] - scale * a[i]
    error = np.abs(scale[:, None] * a + shift[:, None] - b).max(2)
    tolerance = 4.0
    agree = error < tolerance
    best = int(agree.sum(1).argmax())
    inliers, one_scale, one_shift = agree[best], scale[best].copy(), shift[best].copy()
    for _ in range(3):
        if inliers.sum() < 3:
            return None
        for axis in range(2):
            design = np.stack([a[inliers, axis], np.ones(int(inliers.sum()))], 1)
            one_scale[axis], one_shift[axis] = np.linalg.lstsq(design, b[inliers, axis], rcond=None)[0]
        inliers = np.abs(one_scale * a + one_shift - b).max(1) < tolerance
    if inliers.sum() < 3 or (one_scale <= 0.1).any():
        return None
    return (one_scale[0], one_scale[1]), (one_shift[0], one_shift[1]), int(inliers.sum())


def _confirmed(images: Sequence[Signature], guess: _Hypothesis) -> BackgroundMatch | None:
    """Compares pixels; a guess that nearly fits is refined."""
    a = _oriented(images[guess.first].grey, guess.mirrored, guess.turns)
    b = images[guess.second].grey
    least = _RAINY if images[guess.first].rainy or images[guess.second].rainy else _COPY
    warp = np.array([[guess.scale[0], 0, guess.shift[0]], [0, guess.scale[1], guess.shift[1]]])
    swapped = guess.scale[0] * guess.scale[1] < 1
    if swapped:  # sample the finer image at the pixels of the coarser one
        a, b, warp = b, a, cv2.invertAffineTransform(warp)
    score, share, other = _agreement(a, b, warp)
    if score < _SURE and (score > 0.2 or guess.votes >= 6):
        score, share, other = _agreement(a, b, _refined(a, b, warp))
    if score < least or max(share, other) < 0.25:
        return None
    if swapped:
        share, other = other, share
    return BackgroundMatch(guess.first, guess.second, score, guess.mirrored, guess.turns * 90, share, other)


def _refined(a: Grey, b: Grey, warp: Floats) -> Floats:
    """Aligns to a fraction of a pixel: Gauss-Newton on scale and shift by axis, brightness and contrast.

    Only what a crop and a resize can do is aligned, so that a photo taken from a step aside stays apart.
    """
    warp = warp.copy()
    y, x = np.mgrid[: a.shape[0], : a.shape[1]].astype(np.float64)
    for sigma in (4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0):
        seen, target, moved = _overlap(a, b, warp, sigma)
        if seen.sum() < 64:
            return warp
        dx, dy = (cv2.Sobel(moved, cv2.CV_32F, 1 - axis, axis)[seen] / 8 / warp[axis, axis] for axis in (0, 1))
        values = moved[seen]
        columns = [dx * x[seen], dx, dy * y[seen], dy, values, np.ones_like(values), target[seen] - values]
        # products of columns by OpenCV: BLAS would wake threads for so little
        products = cv2.mulTransposed(np.stack(columns).astype(np.float64), False)
        step = np.linalg.solve(products[:6, :6] + 1e-6 * np.eye(6), products[:6, 6])
        warp[0, 0] += step[0]
        warp[0, 2] += step[1]
        warp[1, 1] += step[2]
        warp[1, 2] += step[3]
        if min(warp[0, 0], warp[1, 1]) < 0.1 or not np.isfinite(warp).all():
            return warp
    return warp


def _overlap(
    a: Grey, b: Grey, warp: Floats, sigma: float
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Pixels of ``a`` that ``b`` covers, and both images there, blurred alike."""
    size = a.shape[::-1]
    seen = cv2.warpAffine(np.ones_like(b), warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    seen[[0, -1]] = 0
    seen[:, [0, -1]] = 0
    inner = cv2.erode(seen, np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
    across, down = np.diag(warp[:, :2])
    soft_a = cv2.GaussianBlur(a.astype(np.float32), (0, 0), sigma / min(1, across), None, sigma / min(1, down))
    soft_b = cv2.GaussianBlur(b.astype(np.float32), (0, 0), sigma * max(1, across), None, sigma * max(1, down))
    moved = cv2.warpAffine(soft_b, warp, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    return inner, np.asarray(soft_a, np.float32), np.asarray(moved, np.float32)


def _agreement(a: Grey, b: Grey, warp: Floats) -> tuple[float, float, float]:
    """Correlation of the gradients of ``a`` and of ``b`` at ``warp``, and the shares of each that overlap."""
    if min(warp[0, 0], warp[1, 1]) < 0.1:
        return 0.0, 0.0, 0.0
    seen, soft_a, moved = _overlap(a, b, warp, 1.0)
    if seen.sum() < 64:
        return 0.0, 0.0, 0.0
    left, right = (
        np.concatenate([cv2.Sobel(image, cv2.CV_32F, dx, 1 - dx)[seen] for dx in (0, 1)]) for image in (soft_a, moved)
    )
    norm = float(cv2.norm(left) * cv2.norm(right))
    score = float((left * right).sum(dtype=np.float64)) / norm if norm > 1e-3 else 0.0
    low, high = warp[:, 2], warp[:, 2] + np.diag(warp[:, :2]) * a.shape[::-1]
    overlap = np.clip(np.minimum(high, b.shape[::-1]) - np.maximum(low, 0), 0, None).prod()
    return score, float(overlap / (high - low).prod()), float(overlap / b.size)
