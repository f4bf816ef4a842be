"""Decide which of two aligned images is the rainy one."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.images import Pixels

_MAX_SIDE = 1024  # larger images are shrunk to this longest side before they are compared
_SCALES = np.array([0.2, 0.5, 0.7])  # of the first three cues, which saturate above them
_WEIGHTS = np.array([1.75, 4.2, 4.3])  # fitted to the 1000 pairs of Rain800, Rain100L and Rain100H
_BRIGHTNESS_WEIGHT = 6.0
_WINDOW = 15  # box filter that separates detail from background, in pixels
_CELL = 16  # side of the regions whose detail energy is compared, in pixels


def rain_cues(first: Pixels, second: Pixels) -> NDArray[np.float64]:
    """Return four cues that the first image is the rainy one; swapping the images negates them.

    Each cue is positive if the first image looks rainy:

    - log ratio of the mean absolute Laplacians;
    - difference of the skewness of two residuals: the detail of each image is regressed on the detail of the other
      (streaks are bright and sparse, so that the residual of the rainy image is skewed);
    - log ratio of the energies of the detail in smooth regions (rain adds texture to the sky);
    - mean difference, divided by the mean absolute difference (rain brightens, unless the image was also darkened).

    The detail is the grey image minus its mean over 15×15 pixels.

    Args:
        first: ``(h, w, 3)`` RGB in 0 to 255.
        second: Image of the same scene, same shape.

    Returns:
        ``(4,)``.
    """
    a, b = _small_grey(first), _small_grey(second)
    detail_a, detail_b = a - cv2.blur(a, (_WINDOW, _WINDOW)), b - cv2.blur(b, (_WINDOW, _WINDOW))
    sharpness = np.log(_mean_laplacian(a) / _mean_laplacian(b))
    difference = a - b
    brightness = float(difference.mean()) / (float(np.abs(difference).mean()) + 1e-3)
    return np.array(
        [
            sharpness,
            _residual_skewness(detail_a, detail_b, _unclipped(a, b)),
            _smooth_energy_ratio(detail_a, detail_b),
            brightness,
        ]
    )


def rain_scores(cues: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the log-odds that the first image of each pair is the rainy one, given the other pairs of the data set.

    The cue of brightness counts only if there are at least 8 pairs and the first image is the brighter one in at least
    90 % of them, since some rainy images of Rain800 were darkened.

    Args:
        cues: Result of :func:`rain_cues` for each pair; at least one.

    Returns:
        ``(n,)``, natural logarithms.
    """
    table = np.stack(cues)
    scores = np.tanh(table[:, :3] / _SCALES) @ _WEIGHTS
    brightness = table[:, 3]
    if len(table) >= 8 and (brightness > 0).mean() >= 0.9:
        scores = scores + _BRIGHTNESS_WEIGHT * brightness
    return np.asarray(scores)


def _small_grey(image: Pixels) -> NDArray[np.float32]:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = _MAX_SIDE / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return grey.astype(np.float32)


def _mean_laplacian(grey: NDArray[np.float32]) -> float:
    return float(np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean()) + 1e-3


def _unclipped(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the mask of the pixels that are clipped in neither image; of all pixels if that is less than a tenth."""
    unclipped: NDArray[np.bool_] = (a > 5) & (a < 245) & (b > 5) & (b < 245)
    if unclipped.mean() < 0.1:
        unclipped[:] = True
    return unclipped


def _residual_skewness(a: NDArray[np.float32], b: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Return how much more skewed the residual of ``a`` regressed on ``b`` is than that of ``b`` on ``a``."""
    x, y = a[mask], b[mask]
    xx, xy, yy = float(x @ x) + 1e-6, float(x @ y) + 1e-6, float(y @ y) + 1e-6
    return _skewness(x - np.float32(xy / yy) * y) - _skewness(y - np.float32(xy / xx) * x)


def _skewness(values: NDArray[np.float32]) -> float:
    squares = values * values
    count = max(len(values), 1)
    variance = float(squares.sum()) / count
    return float(squares @ values) / count / float(variance**1.5 + 1e-9)


def _smooth_energy_ratio(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the mean log ratio of detail energies over smooth regions (10th to 50th percentile of the energy)."""
    cell = min(_CELL, *a.shape)
    energy_a, energy_b = _cell_energy(a, cell), _cell_energy(b, cell)
    ratio = np.log(energy_a / energy_b).ravel()
    order = np.argsort(np.log(energy_a * energy_b).ravel(), kind="stable")
    smooth = ratio[order][len(order) // 10 : max(len(order) // 2, 1)]
    return float(smooth.mean())


def _cell_energy(detail: NDArray[np.float32], cell: int) -> NDArray[np.float32]:
    means = cv2.blur(detail * detail, (cell, cell))
    return np.asarray(means[cell // 2 :: cell, cell // 2 :: cell] + 1, np.float32)
