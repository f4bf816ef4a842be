"""Find images with the same background, even if they are cropped, flipped, rotated, resized or differ in their rain.

Candidates are found by thumbnails of whole images and by local features (SIFT, Lowe, IJCV 2004) whose positions agree
on an orientation (flip and rotation by a multiple of 90°), scale and shift. A candidate is a match if the gradients of
the aligned images agree pixel by pixel; those of two photos of one scene from different places do not.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.images import Pixels

SEARCH_VERSION = 1
"""Increment when a change to the search alters which images match."""

_SEARCH_SIDE = 400  # longest side at which features are detected, in pixels
_COMPARE_SIDE = 256  # longest side at which pixels are compared
_MAX_FEATURES = 150  # per image
_NEIGHBOURS = 8  # number of most similar features that are searched for each feature
_MAX_DISTANCE = 250  # between SIFT descriptors; features of copies are closer, most others farther
_MAX_ROTATION_ERROR = 12  # degrees between the rotation of a feature and the nearest multiple of 90
_MAX_GROUP = 40  # at most so many matching features are used to fit scale and shift
_TOLERANCE = 4.0  # pixels between matching features after scale and shift
_THUMBNAIL_SIDE = 16
_THUMBNAIL_CORRELATION = 0.96  # above it, two whole images are compared pixel by pixel
_CERTAIN_SCORE = 0.998  # from here, refining the alignment would hardly raise the score
_REFINED_SCORE = 0.2  # below it, an alignment is refined only if enough features vote for it
_REFINED_VOTES = 6  # features that are then enough
_MIN_COPY_SCORE = 0.99  # of a match of two images without rain
_MIN_RAINY_SCORE = 0.9  # of a match if at least one image has rain
_MIN_SHARE = 0.25  # of the area of at least one image that the other must show
_WHOLE_SHARE = 0.97  # of the area; images that show less count as cropped
_MIN_OVERLAP = 64  # pixels

Floats = NDArray[np.float64]
Grey = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Signature:
    """Reduced image and its local features, from which the background is recognised.

    Attributes:
        grey: Greyscale image, ``(h, w)`` in 0 to 255, reduced to a longest side of at most 256 pixels.
        points: x and y of the features in ``grey`` in pixels, and their angle in degrees, ``(n, 3)``.
        descriptors: SIFT descriptors of the features, ``(n, 128)`` in 0 to 255.
        rainy: Whether the image has rain.
    """

    grey: NDArray[np.uint8]
    points: NDArray[np.float32]
    descriptors: NDArray[np.uint8]
    rainy: bool = False


@dataclass(frozen=True)
class BackgroundMatch:
    """Two images with the same background.

    Attributes:
        first: Index of the first image.
        second: Index of the second image.
        score: Correlation of the gradients of the two images where they overlap, at most 1.
        flipped_vertically: Whether the first image must be flipped upside down to match the second.
        rotation: Clockwise rotation of the first image after the flip, in degrees: 0, 90, 180 or 270.
        share: Share of the first image's area that the second one shows, 0 to 1.
        second_share: Share of the second image's area that the first one shows, 0 to 1.
    """

    first: int
    second: int
    score: float
    flipped_vertically: bool
    rotation: int
    share: float
    second_share: float

    def __str__(self) -> str:
        """Return how the images differ: ``unchanged`` if they are neither flipped nor rotated nor cropped.

        Example:
            >>> str(BackgroundMatch(0, 1, 1.0, True, 180, 1.0, 1.0))
            'flipped left to right'
        """
        changes = []
        if self.flipped_vertically:
            flips = {0: "flipped upside down", 90: "transposed", 180: "flipped left to right"}
            changes.append(flips.get(self.rotation, "transposed and rotated by 180°"))
        elif self.rotation:
            changes.append(f"rotated by {self.rotation}°")
        share = min(self.share, self.second_share)
        if share < _WHOLE_SHARE:
            changes.append(f"cropped to {share:.0%} of its area")
        return ", ".join(changes) or "unchanged"


def compute_signature(pixels: Pixels, *, rainy: bool = False, features: bool = True) -> Signature:
    """Return the signature of an image.

    Args:
        pixels: ``(h, w, 3)`` in 0 to 255.
        rainy: Whether the image has rain; if so, thin bright streaks are suppressed.
        features: Whether to compute local features; without them, only images of nearly the same area are recognised.
    """
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    if rainy:
        grey = np.asarray(cv2.morphologyEx(grey, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), np.uint8)
    small = _shrunk(grey, _COMPARE_SIDE)
    if features:
        points, descriptors = _features(grey, small.shape[1])
    else:
        points, descriptors = np.zeros((0, 3), np.float32), np.zeros((0, 128), np.uint8)
    return Signature(small, points, descriptors, rainy)


def _features(grey: Grey, width: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return points and descriptors of the strongest features, in coordinates of an image of the given width."""
    reduced = _shrunk(grey, _SEARCH_SIDE)
    keypoints, descriptors = cv2.SIFT.create(nfeatures=_MAX_FEATURES).detectAndCompute(reduced, None)
    if descriptors is None:
        return np.zeros((0, 3), np.float32), np.zeros((0, 128), np.uint8)
    strongest = np.argsort([-keypoint.response for keypoint in keypoints], kind="stable")[:_MAX_FEATURES]
    scale = width / reduced.shape[1]
    points = []
    for index in strongest:
        x, y = keypoints[index].pt
        points.append((x * scale, y * scale, keypoints[index].angle))
    return np.array(points, np.float32), descriptors[strongest].astype(np.uint8)


def _shrunk(grey: Grey, side: int) -> Grey:
    scale = side / max(grey.shape)
    if scale >= 1:
        return grey
    size = [max(1, round(length * scale)) for length in grey.shape[::-1]]
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)


def find_matches(
    first: Sequence[Signature], second: Sequence[Signature] | None = None, *, features: bool = True
) -> list[BackgroundMatch]:
    """Return all pairs of images with the same background.

    Args:
        first: Signatures of some images.
        second: Signatures of the images to compare them with; by default, the images in ``first`` are compared with
            each other.
        features: Whether to compare local features too; without them, only images of nearly the same area are found.

    Returns:
        One match per pair of images, sorted by index. ``BackgroundMatch.first`` is an index in ``first``;
        ``BackgroundMatch.second`` is an index in ``second`` if that is given, else in ``first``.
    """
    signatures = [*first, *(second or ())]
    if len(signatures) < 2:
        return []
    best: dict[tuple[int, int], BackgroundMatch] = {}
    searches = [_by_thumbnail, _by_features] if features else [_by_thumbnail]
    for search in searches:
        hypotheses = []
        for hypothesis in search(signatures):
            is_compared = second is None or (hypothesis.first < len(first)) != (hypothesis.second < len(first))
            if is_compared and (hypothesis.first, hypothesis.second) not in best:
                hypotheses.append(hypothesis)
        with ThreadPoolExecutor() as threads:
            for match in threads.map(lambda hypothesis: _confirmed(signatures, hypothesis), hypotheses):
                if match is None:
                    continue
                previous = best.setdefault((match.first, match.second), match)
                if match.score >= previous.score:
                    best[match.first, match.second] = match
    matches = [best[indices] for indices in sorted(best)]
    if second is None:
        return matches
    return [replace(match, second=match.second - len(first)) for match in matches]


@dataclass(frozen=True)
class _Hypothesis:
    """Possible match of two images.

    After the flip and rotation of the first image, its point ``xy`` is at ``scale * xy + shift`` in the second image.

    Attributes:
        first: Index of the first image.
        second: Index of the second image.
        flipped_vertically: Whether the first image is flipped upside down.
        quarter_turns: Clockwise quarter turns of the first image after the flip.
        scale: Scale in x and y.
        shift: Shift in x and y, in pixels of the second image.
        votes: Number of features that agree; `_MAX_FEATURES` for a hypothesis from thumbnails.
    """

    first: int
    second: int
    flipped_vertically: bool
    quarter_turns: int
    scale: tuple[float, float]
    shift: tuple[float, float]
    votes: int


def _oriented(image: Grey, flipped_vertically: bool, quarter_turns: int) -> Grey:
    return np.ascontiguousarray(np.rot90(image[::-1] if flipped_vertically else image, -quarter_turns))


def _oriented_points(points: Floats, shape: tuple[int, ...], flipped_vertically: bool, quarter_turns: int) -> Floats:
    """Return the coordinates of points ``(n, 2)`` after an image of the given shape was flipped and rotated."""
    x, y = points[:, 0], points[:, 1]
    h, w = shape[:2]
    if flipped_vertically:
        y = h - 1 - y
    for _ in range(quarter_turns):
        x, y, h, w = h - 1 - y, x, w, h
    return np.stack([x, y], 1)


def _by_thumbnail(signatures: Sequence[Signature]) -> list[_Hypothesis]:
    """Return hypotheses for pairs of whole images with similar thumbnails, in any of the eight orientations."""
    size = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
    thumbnails = [
        np.asarray(cv2.resize(signature.grey, size, interpolation=cv2.INTER_AREA), np.uint8) for signature in signatures
    ]
    targets = _standardised(thumbnails)
    hypotheses = []
    for flipped_vertically in (False, True):
        for quarter_turns in range(4):
            oriented = [_oriented(thumbnail, flipped_vertically, quarter_turns) for thumbnail in thumbnails]
            sources = _standardised(oriented)
            for start in range(0, len(signatures), 1024):  # blocks bound the memory
                is_similar = sources[start : start + 1024] @ targets.T > _THUMBNAIL_CORRELATION
                for offset, second in zip(*np.nonzero(is_similar), strict=True):
                    first = start + int(offset)
                    if first < second:
                        hypotheses.append(
                            _whole_image_hypothesis(signatures, first, int(second), flipped_vertically, quarter_turns)
                        )
    return hypotheses


def _standardised(thumbnails: Sequence[Grey]) -> NDArray[np.float32]:
    flat = np.stack(thumbnails).reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), np.float32)


def _whole_image_hypothesis(
    signatures: Sequence[Signature], first: int, second: int, flipped_vertically: bool, quarter_turns: int
) -> _Hypothesis:
    """Return the hypothesis that both images show the same area."""
    h, w = signatures[first].grey.shape
    if quarter_turns % 2:
        h, w = w, h
    target_h, target_w = signatures[second].grey.shape
    scale = (target_w / w, target_h / h)
    shift = ((scale[0] - 1) / 2, (scale[1] - 1) / 2)
    # So many votes ensure that an inexact alignment is refined.
    return _Hypothesis(first, second, flipped_vertically, quarter_turns, scale, shift, votes=_MAX_FEATURES)


def _by_features(signatures: Sequence[Signature]) -> list[_Hypothesis]:
    """Return hypotheses for pairs of images whose features agree on an orientation, scale and shift."""
    if not any(len(signature.points) for signature in signatures):
        return []
    descriptors = np.concatenate([signature.descriptors for signature in signatures]).astype(np.float32)
    points = np.concatenate([signature.points for signature in signatures]).astype(np.float64)
    owner = np.repeat(np.arange(len(signatures)), [len(signature.points) for signature in signatures])
    cv2.setRNGSeed(0)
    search_index = cv2.flann.Index(descriptors, {"algorithm": 1, "trees": 4})
    feature_pairs = np.concatenate(
        [
            _similar_features(search_index, descriptors, points[:, 2], owner, flipped_vertically=False),
            _similar_features(
                search_index, _flipped_descriptors(descriptors), points[:, 2], owner, flipped_vertically=True
            ),
        ]
    )
    hypotheses = []
    for group in _groups_of_equal_rows(feature_pairs, columns=4):
        if len(group) < 3:
            continue
        first, second, flip, quarter_turns = (int(value) for value in group[0, :4])
        flipped_vertically = bool(flip)
        closest = group[np.argsort(group[:, 6], kind="stable")[:_MAX_GROUP]]
        shape = signatures[first].grey.shape
        source = _oriented_points(points[closest[:, 4], :2], shape, flipped_vertically, quarter_turns)
        target = points[closest[:, 5], :2]
        fit = _fit_scale_and_shift(source, target)
        if fit is not None:
            scale, shift, count = fit
            hypotheses.append(_Hypothesis(first, second, flipped_vertically, quarter_turns, scale, shift, count))
    return hypotheses


def _groups_of_equal_rows(table: NDArray[np.int64], columns: int) -> list[NDArray[np.int64]]:
    """Sort the rows, and group those that are equal in the given number of first columns."""
    table = table[np.lexsort(table.T[::-1])]
    is_first = (np.diff(table[:, :columns], axis=0, prepend=-1) != 0).any(1)
    limits = [*np.flatnonzero(is_first).tolist(), len(table)]
    return [table[start:end] for start, end in pairwise(limits)]


def _flipped_descriptors(descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the SIFT descriptors (4 x 4 cells of 8 angles) of upside-down images: rows reversed, angles negated."""
    cells = descriptors.reshape(-1, 4, 4, 8)[:, ::-1][..., -np.arange(8) % 8]
    return np.ascontiguousarray(cells.reshape(-1, 128))


def _similar_features(
    search_index: "cv2.flann.Index",
    queries: NDArray[np.float32],
    angles: Floats,
    owner: NDArray[np.int64],
    flipped_vertically: bool,
) -> NDArray[np.int64]:
    """Return pairs of similar features of different images.

    Args:
        search_index: Search index of all descriptors.
        queries: Descriptors to search for, ``(n, 128)``; those of the flipped images if ``flipped_vertically``.
        angles: Angles of the features in degrees, ``(n,)``.
        owner: Index of the image that each feature belongs to, ``(n,)``.
        flipped_vertically: Whether the query images are flipped.

    Returns:
        ``(m, 7)``: first image, second image, whether the first image is flipped vertically, quarter turns of the
        first image, first feature, second feature, distance.
    """
    parts = [part for part in np.array_split(queries, 8) if len(part)]
    count = min(_NEIGHBOURS, len(queries))
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda part: search_index.knnSearch(part, count, params={"checks": 32}), parts))
    a = np.repeat(np.arange(len(queries)), count)
    b = np.concatenate([ids for ids, _ in results]).astype(np.int64).ravel()
    distance = np.sqrt(np.concatenate([squares for _, squares in results])).ravel()
    rotation = angles[b] + (angles[a] if flipped_vertically else -angles[a])
    quarter_turns = np.rint(rotation / 90).astype(np.int64)
    different = owner[a] != owner[b]
    similar = different & (distance < _MAX_DISTANCE) & (np.abs(rotation - 90 * quarter_turns) < _MAX_ROTATION_ERROR)
    a, b, quarter_turns, distance = a[similar], b[similar], quarter_turns[similar] % 4, distance[similar]
    # The first image is always the earlier one. Swapping the images inverts a rotation; a flip followed by a rotation
    # is its own inverse.
    swapped = owner[a] > owner[b]
    quarter_turns = np.where(swapped & (not flipped_vertically), -quarter_turns % 4, quarter_turns)
    a, b = np.where(swapped, b, a), np.where(swapped, a, b)
    columns = [owner[a], owner[b], np.full(len(a), flipped_vertically), quarter_turns, a, b, distance.astype(np.int64)]
    return np.unique(np.stack(columns, 1).astype(np.int64), axis=0)


def _fit_scale_and_shift(a: Floats, b: Floats) -> tuple[tuple[float, float], tuple[float, float], int] | None:
    """Return the scale and shift per axis that map most points ``a`` to ``b``, ``(n, 2)`` each.

    Returns:
        Scale, shift, and the number of points that agree; None if there is no plausible scale, fewer than three points
        agree, or a scale is at most 0.1.
    """
    scales, shifts = _candidates(a, b)
    if not len(scales):
        return None
    error = np.abs(scales[:, None] * a + shifts[:, None] - b).max(2)
    agree = error < _TOLERANCE
    best = int(agree.sum(1).argmax())
    inliers, scale, shift = agree[best], scales[best].copy(), shifts[best].copy()
    for _ in range(3):
        if inliers.sum() < 3:
            return None
        for axis in range(2):
            design = np.stack([a[inliers, axis], np.ones(int(inliers.sum()))], 1)
            scale[axis], shift[axis] = np.linalg.lstsq(design, b[inliers, axis], rcond=None)[0]
        inliers = np.abs(scale * a + shift - b).max(1) < _TOLERANCE
    if inliers.sum() < 3 or (scale <= 0.1).any():
        return None
    return (scale[0], scale[1]), (shift[0], shift[1]), int(inliers.sum())


def _candidates(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Return plausible scales and shifts per axis, ``(m, 2)`` each; each maps two of the points ``a`` to ``b``."""
    i, j = np.triu_indices(len(a), 1)
    distance_a, distance_b = a[i] - a[j], b[i] - b[j]
    far = (np.abs(distance_a) > 5).all(1) & (np.abs(distance_b) > 2).all(1)
    i = i[far]
    scale = distance_b[far] / distance_a[far]
    bounded = np.clip(scale, 0.1, 10)
    aspect = bounded[:, 0] / bounded[:, 1]
    plausible = (scale == bounded).all(1) & (aspect > 1 / 1.8) & (aspect < 1.8)
    i, scale = i[plausible], scale[plausible]
    return scale, b[i] - scale * a[i]


def _confirmed(signatures: Sequence[Signature], hypothesis: _Hypothesis) -> BackgroundMatch | None:
    """Return the match if the pixels agree, if necessary after refining the alignment; else None."""
    first, second = signatures[hypothesis.first], signatures[hypothesis.second]
    a = _oriented(first.grey, hypothesis.flipped_vertically, hypothesis.quarter_turns)
    b = second.grey
    min_score = _MIN_RAINY_SCORE if first.rainy or second.rainy else _MIN_COPY_SCORE
    scale, shift = hypothesis.scale, hypothesis.shift
    warp = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    swapped = scale[0] * scale[1] < 1
    if swapped:  # sample the finer image at the pixels of the coarser one
        a, b, warp = b, a, cv2.invertAffineTransform(warp)
    score, a_share, b_share = _agreement(a, b, warp)
    if score < _CERTAIN_SCORE and (score > _REFINED_SCORE or hypothesis.votes >= _REFINED_VOTES):
        score, a_share, b_share = _agreement(a, b, _refined(a, b, warp))
    if score < min_score or max(a_share, b_share) < _MIN_SHARE:
        return None
    return BackgroundMatch(
        first=hypothesis.first,
        second=hypothesis.second,
        score=score,
        flipped_vertically=hypothesis.flipped_vertically,
        rotation=hypothesis.quarter_turns * 90,
        share=b_share if swapped else a_share,
        second_share=a_share if swapped else b_share,
    )


def _refined(a: Grey, b: Grey, warp: Floats) -> Floats:
    """Refine an alignment to a fraction of a pixel.

    Gauss-Newton steps fit scale and shift per axis, brightness and contrast. Other transforms are not fitted, so that a
    photo taken from a step aside does not match.
    """
    warp = warp.copy()
    y, x = np.mgrid[: a.shape[0], : a.shape[1]].astype(np.float64)
    for sigma in (4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0):
        inside, target, moved = _overlap(a, b, warp, sigma)
        if inside.sum() < _MIN_OVERLAP:
            return warp
        dx = cv2.Sobel(moved, cv2.CV_32F, 1, 0)[inside] / 8 / warp[0, 0]
        dy = cv2.Sobel(moved, cv2.CV_32F, 0, 1)[inside] / 8 / warp[1, 1]
        values = moved[inside]
        columns = [dx * x[inside], dx, dy * y[inside], dy, values, np.ones_like(values), target[inside] - values]
        # OpenCV multiplies the columns: for so few, the threads of BLAS would take longer.
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
    """Return a mask of the pixels of ``a`` well inside the area of ``b``, and both images, aligned and equally blurred.

    Args:
        a: Image whose pixel grid is used.
        b: Image that is resampled.
        warp: ``(2, 3)``; maps positions in ``a`` to positions in ``b``.
        sigma: Standard deviation of the blur, in pixels of the coarser image along each axis.
    """
    size = a.shape[::-1]
    covered = cv2.warpAffine(np.ones_like(b), warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    covered[[0, -1]] = 0
    covered[:, [0, -1]] = 0
    inside = cv2.erode(covered, np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
    across, down = np.diag(warp[:, :2])
    soft_a = cv2.GaussianBlur(a.astype(np.float32), (0, 0), sigma / min(1, across), None, sigma / min(1, down))
    soft_b = cv2.GaussianBlur(b.astype(np.float32), (0, 0), sigma * max(1, across), None, sigma * max(1, down))
    moved = cv2.warpAffine(soft_b, warp, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    return inside, np.asarray(soft_a, np.float32), np.asarray(moved, np.float32)


def _agreement(a: Grey, b: Grey, warp: Floats) -> tuple[float, float, float]:
    """Return the correlation of the gradients of ``a`` and the warped ``b``, and the overlapping share of each."""
    if min(warp[0, 0], warp[1, 1]) < 0.1:
        return 0.0, 0.0, 0.0
    inside, soft_a, moved = _overlap(a, b, warp, 1.0)
    if inside.sum() < _MIN_OVERLAP:
        return 0.0, 0.0, 0.0
    gradients_a, gradients_b = _gradients(soft_a, inside), _gradients(moved, inside)
    norm = float(cv2.norm(gradients_a) * cv2.norm(gradients_b))
    score = float((gradients_a * gradients_b).sum(dtype=np.float64)) / norm if norm > 1e-3 else 0.0
    low = warp[:, 2]
    high = low + np.diag(warp[:, :2]) * a.shape[::-1]
    overlap = np.clip(np.minimum(high, b.shape[::-1]) - np.maximum(low, 0), 0, None).prod()
    return score, float(overlap / (high - low).prod()), float(overlap / b.size)


def _gradients(image: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    vertical = cv2.Sobel(image, cv2.CV_32F, 0, 1)[inside]
    horizontal = cv2.Sobel(image, cv2.CV_32F, 1, 0)[inside]
    return np.asarray(np.concatenate([vertical, horizontal]), np.float32)
