"""Which of two aligned images has the rain on it."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.images import Pixels

_SIDE = 1024  # longest side at which the images are compared
_SCALES = np.array([0.2, 0.5, 0.7])
_WEIGHTS = np.array([1.75, 4.2, 4.3])  # log-odds, fitted to the 1000 pairs of Rain800, Rain100L and Rain100H
_BRIGHTNESS = 6.0


def rain_cues(first: Pixels, second: Pixels) -> NDArray[np.float64]:
    """Signs that rain lies on the first image rather than on the second; exchanging the two negates them.

    Args:
        first: ``(h, w, 3)`` in 0 to 255.
        second: The same scene, of the same size.

    Returns:
        Four numbers, positive where rain lies on the first: log ratio of mean absolute Laplacians; skewness of
        what either has that the other does not explain (streaks are bright and sparse); log ratio of energies
        in smooth regions (rain textures the sky); and mean difference over mean absolute difference
        (rain only brightens, unless the image was darkened as well).
    """
    a, b = (_small_grey(image) for image in (first, second))
    laplacians = [float(np.abs(cv2.Laplacian(image, cv2.CV_32F)).mean()) + 1e-3 for image in (a, b)]
    inside = (a > 5) & (a < 245) & (b > 5) & (b < 245)
    if inside.mean() < 0.1:
        inside[:] = True
    high_a, high_b = (image - cv2.blur(image, (15, 15)) for image in (a, b))
    x, y = high_a[inside], high_b[inside]
    xx, xy, yy = (float(p @ q) + 1e-6 for p, q in ((x, x), (x, y), (y, y)))
    left_over = _skewness(x - np.float32(xy / yy) * y) - _skewness(y - np.float32(xy / xx) * x)
    cell = min(16, *a.shape)
    energies = [
        cv2.blur(high * high, (cell, cell))[cell // 2 :: cell, cell // 2 :: cell] + 1 for high in (high_a, high_b)
    ]
    ratio = np.log(energies[0] / energies[1]).ravel()
    order = np.argsort(np.log(energies[0] * energies[1]).ravel(), kind="stable")
    smooth = ratio[order][len(order) // 10 : max(len(order) // 2, 1)]
    difference = a - b
    brighter = float(difference.mean()) / (float(np.abs(difference).mean()) + 1e-3)
    return np.array([np.log(laplacians[0] / laplacians[1]), left_over, smooth.mean(), brighter])


def rain_scores(cues: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Log-odds that rain lies on the first image of each pair, judged together with the other pairs of a set.

    Brightness tells only where it does so throughout the set: Rain800 darkens some of its rainy images.

    Args:
        cues: Of :func:`rain_cues`, one a pair.
    """
    table = np.stack(cues)
    scores = np.tanh(table[:, :3] / _SCALES) @ _WEIGHTS
    brighter = table[:, 3]
    if len(table) >= 8 and (brighter > 0).mean() >= 0.9:
        scores = scores + _BRIGHTNESS * brighter
    return np.asarray(scores)


def _small_grey(image: Pixels) -> NDArray[np.float32]:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = _SIDE / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return grey.astype(np.float32)


def _skewness(values: NDArray[np.float32]) -> float:
    squares = values * values
    count = max(len(values), 1)
    spread = float(squares.sum()) / count
    return float(squares @ values) / count / float(spread**1.5 + 1e-9)
