"""PSNR and SSIM of one image in float64.

The filtering is OpenCV's separable one: torchmetrics' SSIM map, cut by 5 pixels, is the same to 1e-9 (tested)
but takes about 200 times as long in float64 on a CPU, and its import alone takes seconds. Working outside
torch also keeps autocast and the devices' arithmetic away from the numbers: they are the same everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.errors import DerainError
from derain.ranges import OVERSHOOT, check_range

from .protocols import Protocol

Array = NDArray[np.float64]

MAX_PSNR = 100.0
"""PSNR in dB that stands for infinity, so that means stay finite: the value of images that are the same."""

_LUMA = np.array([[65.481 / 255, 128.553 / 255, 24.966 / 255, 16.0]])  # Rec. ITU-R BT.601, limited range
_WINDOW = cv2.getGaussianKernel(11, 1.5, cv2.CV_64F)
_EDGE = 5  # half the window
_STRIP = 128  # rows filtered at once
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass
class Scores:
    """Scores of images under one protocol, sorted by index.

    Attributes:
        index: ``(n,)``, places of the images in their set.
        psnr: ``(n,)``, dB; 100 for an image that equals the clean one.
        ssim: ``(n,)``.
        lpips: ``(n,)``, the same under every protocol; none where it was not asked for.
    """

    index: NDArray[np.int64]
    psnr: Array
    ssim: Array
    lpips: Array | None = None


def psnr_ssim(derained: NDArray[Any], clean: NDArray[Any], protocol: Protocol) -> tuple[float, float]:
    """Judges one image.

    Args:
        derained: ``(h, w, 3)``, RGB; uint8, or float32 or float64 in [0, 1].
        clean: The same shape.
        protocol: What is compared and how.

    Returns:
        PSNR in dB (at most 100) and SSIM.

    Raises:
        DerainError: If the shapes differ, the images are too small for the protocol or of another type, or floats
            are not in [0, 1].

    Example:
        >>> from derain.metrics import resolve
        >>> clean = np.full((32, 32, 3), 100, np.uint8)
        >>> psnr, ssim = psnr_ssim(clean + np.uint8(5), clean, resolve(["rgb"])[0])
        >>> round(psnr, 2), round(ssim, 4)
        (34.15, 0.9988)
    """
    if derained.shape != clean.shape:
        raise DerainError(f"derained and clean image must be of one size, got {_size(derained)} and {_size(clean)}")
    check_values(derained, clean)
    border = protocol.border
    height, width = clean.shape[0] - 2 * border, clean.shape[1] - 2 * border
    shrink = max(1, int(min(height, width) / 256 + 0.5)) if protocol.downsample else 1
    least = 1 if protocol.ssim == "padded" else len(_WINDOW)
    if min(height, width) < least:
        needed = least + 2 * border
        raise DerainError(
            f"protocol {protocol.name} needs images of at least {needed}x{needed} pixels, "
            f"got {_size(clean)}; leave the image out"
        )
    x, y = (
        _planes(image[border : border + height, border : border + width], output, protocol)
        for image, output in (
            (derained, protocol.output),
            (clean, "round" if protocol.output != "none" else "none"),
        )
    )
    psnr = _psnr(np.clip(x, 0, 255) if protocol.output == "none" else x, y)
    values = []
    for plane in range(x.shape[2]):
        pair = [_shrunk(image[..., plane], shrink) for image in (x, y)]
        if protocol.ssim == "padded":
            pair = [np.pad(image, _EDGE) for image in pair]
        values.append(_ssim(*pair))
    return psnr, sum(values) / len(values)


def check_values(derained: NDArray[Any], clean: NDArray[Any], name: str = "") -> None:
    """Check that floating-point images are in [0, 1], not in 0 to 255, where clipping would make all of them white.

    Raises:
        DerainError: If values are not finite, or leave [0, 1]; those of the derained image may do so by up to 1.
    """
    of_name = f"{name}: " if name else ""
    for kind, image, overshoot in (("derained", derained, 1.0), ("clean", clean, OVERSHOOT)):
        if image.dtype.kind == "f":
            check_range(image, f"{of_name}{kind} image", overshoot)


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _planes(image: NDArray[Any], output: str, protocol: Protocol) -> Array:
    """Values to compare, ``(h, w, 1 or 3)``, 0 to 255."""
    if image.dtype == np.uint8:
        values = image.astype(np.float64)
    elif image.dtype in (np.float32, np.float64):
        if output == "none":
            values = image.astype(np.float64) * 255
        else:
            # In the image's own type, as authors multiply: k / 255 comes back as exactly k, not just below.
            values = np.clip((image * image.dtype.type(255)).astype(np.float64), 0, 255)
            values = np.rint(values) if output == "round" else np.trunc(values)
    else:
        raise DerainError(f"images to judge must be uint8, float32 or float64, got {image.dtype}; convert them first")
    if protocol.colour == "rgb":
        return values
    luma = cv2.transform(np.ascontiguousarray(values), _LUMA).reshape(*values.shape[:2], 1)
    return cast(Array, np.rint(luma) if protocol.luma_rounded else luma)


def _psnr(x: Array, y: Array) -> float:
    error = float(np.mean(np.square(x - y)))
    return MAX_PSNR if error == 0 else min(10 * math.log10(255**2 / error), MAX_PSNR)


def _shrunk(plane: Array, by: int) -> Array:
    """Down-sampling of ssim.m: imfilter(ones(f) / f², 'symmetric'), then every f-th pixel."""
    if by == 1:
        return np.ascontiguousarray(plane)
    anchor = ((by - 1) // 2,) * 2  # where MATLAB puts the centre of an even filter
    means = cv2.blur(np.ascontiguousarray(plane), (by, by), anchor=anchor, borderType=cv2.BORDER_REFLECT)
    return np.ascontiguousarray(means[::by, ::by])


def _ssim(x: Array, y: Array) -> float:
    """Mean SSIM where the whole window lies inside the image (Wang et al., TIP 2004, eq. 13).

    The two variances occur as their sum only. Strips keep large images out of memory and small ones in cache.
    """
    rows, columns = (int(length) - 2 * _EDGE for length in x.shape)
    strips = [slice(top, top + _STRIP + 2 * _EDGE) for top in range(0, rows, _STRIP)]
    return sum(float(_ssim_map(x[strip], y[strip]).sum()) for strip in strips) / (rows * columns)


def _ssim_map(x: Array, y: Array) -> Array:
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    product = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    covariance = _local_mean(x * y) - product
    variances = _local_mean(x * x + y * y) - squares
    return (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))


def _local_mean(values: Array) -> Array:
    """Gaussian mean around every pixel whose window lies inside."""
    return cast(Array, cv2.sepFilter2D(values, cv2.CV_64F, _WINDOW, _WINDOW)[_EDGE:-_EDGE, _EDGE:-_EDGE])


def bootstrap_interval(
    values: NDArray[np.floating[Any]], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean: percentiles of the means of images drawn with replacement.

    Args:
        values: ``(n,)``, one an image.
        resamples: How often n images are drawn.
        seed: The same seed gives the same interval.

    Example:
        >>> low, high = bootstrap_interval(np.arange(100.0))
        >>> low < 49.5 < high
        True
    """
    values = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
