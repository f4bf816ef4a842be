"""PSNR and SSIM of one image in float64, and means over the images of a data set.

OpenCV applies the Gaussian window of SSIM, since torchmetrics is slower in float64 on a CPU. Without torch, the
scores depend neither on autocast nor on the device.
"""

import math
from collections.abc import Sequence
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
"""PSNR of identical images in dB, and upper limit of every PSNR, so that means are finite."""

_LUMA = np.array([[65.481 / 255, 128.553 / 255, 24.966 / 255, 16.0]])  # Rec. ITU-R BT.601, limited range
_WINDOW = cv2.getGaussianKernel(11, 1.5, cv2.CV_64F)
_MARGIN = 5  # half the window
_STRIP = 128  # rows that are filtered at once
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass
class Scores:
    """Scores of images by one protocol, sorted by index.

    Attributes:
        index: ``(n,)``, indices of the images in the data set.
        psnr: ``(n,)`` in dB, at most 100; NaN for images that cannot be scored.
        ssim: ``(n,)``, at most 1; NaN for images that cannot be scored.
        lpips: ``(n,)``, the same for all protocols; NaN for images that cannot be scored; None if not computed.
    """

    index: NDArray[np.int64]
    psnr: Array
    ssim: Array
    lpips: Array | None = None


def mean_scores(derained: Scores, rainy: Scores, indices: Sequence[int] | None = None) -> dict[str, float]:
    """Return the means over images: ``psnr``, ``ssim``, ``rainy_psnr``, and ``lpips`` if it was computed.

    Args:
        derained: Scores of the derained images.
        rainy: Scores of the rainy images, with the same indices.
        indices: Indices of the images in the data set, by default all; those that were not evaluated are ignored.

    Returns:
        The means by name, NaN if an image could not be scored; empty if no image was evaluated.
    """
    included = np.ones(len(derained.index), bool) if indices is None else np.isin(derained.index, indices)
    if not included.any():
        return {}
    columns = {"psnr": derained.psnr, "ssim": derained.ssim, "rainy_psnr": rainy.psnr}
    if derained.lpips is not None:
        columns["lpips"] = derained.lpips
    return {name: float(column[included].mean()) for name, column in columns.items()}


def psnr_ssim(derained: NDArray[Any], clean: NDArray[Any], protocol: Protocol) -> tuple[float, float]:
    """Return PSNR and SSIM of one image.

    Args:
        derained: ``(h, w, 3)``, RGB; uint8, or float32 or float64 in [0, 1]. Values may exceed this range by up to 1;
            the protocol says where they are clipped.
        clean: Same shape; uint8, or float32 or float64 in [0, 1].
        protocol: Definition of PSNR and SSIM.

    Returns:
        PSNR in dB (at most 100), and SSIM.

    Raises:
        DerainError: If the shapes differ, the images are too small for the protocol, their type is not supported, or
            values are out of range.

    Example:
        >>> from derain.metrics import resolve
        >>> clean = np.full((32, 32, 3), 100, np.uint8)
        >>> psnr, ssim = psnr_ssim(clean + np.uint8(5), clean, resolve(["rgb"])[0])
        >>> round(psnr, 2), round(ssim, 4)
        (34.15, 0.9988)
    """
    if derained.shape != clean.shape:
        raise DerainError(f"derained and clean image must have equal sizes, got {_size(derained)} and {_size(clean)}")
    check_values(derained, clean)
    _check_size(clean, protocol)
    x = _planes(derained, protocol.output, protocol)
    y = _planes(clean, "none" if protocol.output == "none" else "round", protocol)
    psnr = _psnr(np.clip(x, 0, 255) if protocol.output == "none" else x, y)
    shrink = max(1, int(min(x.shape[:2]) / 256 + 0.5)) if protocol.downsample else 1
    planes = range(x.shape[2])
    ssim = sum(_plane_ssim(x[..., plane], y[..., plane], shrink, protocol.ssim) for plane in planes) / len(planes)
    return psnr, ssim


def _check_size(image: NDArray[Any], protocol: Protocol) -> None:
    window = 1 if protocol.ssim == "padded" else len(_WINDOW)
    minimum = window + 2 * protocol.border
    if min(image.shape[:2]) < minimum:
        raise DerainError(
            f"image of {_size(image)} pixels: protocol {protocol.name} needs at least {minimum}x{minimum}; omit the "
            "image"
        )


def check_values(derained: NDArray[Any], clean: NDArray[Any], name: str = "") -> None:
    """Check that floating-point images are in [0, 1], since clipping would turn images in [0, 255] white.

    Args:
        derained: Derained image; values may exceed [0, 1] by up to 1.
        clean: Clean image; values may exceed [0, 1] by up to 0.25.
        name: Name of the image in messages.

    Raises:
        DerainError: If values are not finite or out of range.
    """
    prefix = f"{name}: " if name else ""
    for kind, image, overshoot in (("derained", derained, 1.0), ("clean", clean, OVERSHOOT)):
        if image.dtype.kind == "f":
            check_range(image, f"{prefix}{kind} image", overshoot)


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _planes(image: NDArray[Any], output: str, protocol: Protocol) -> Array:
    """Return luma ``(h, w, 1)`` or RGB ``(h, w, 3)`` on the scale of 8-bit values, without the border."""
    height, width = image.shape[:2]
    border = protocol.border
    values = _to_255(image[border : height - border, border : width - border], output)
    if protocol.colour == "rgb":
        return values
    luma = cv2.transform(np.ascontiguousarray(values), _LUMA).reshape(*values.shape[:2], 1)
    return cast(Array, np.rint(luma) if protocol.luma_rounded else luma)


def _to_255(image: NDArray[Any], output: str) -> Array:
    """Return an image in 0 to 255: uint8 as it is; floats are scaled, then converted by ``output`` of a `Protocol`."""
    if image.dtype == np.uint8:
        return image.astype(np.float64)
    if image.dtype not in (np.float32, np.float64):
        raise DerainError(f"image type {image.dtype} is not supported; convert images to uint8, float32 or float64")
    if output == "none":
        return image.astype(np.float64) * 255
    # Multiplied in the image's own type, as in the papers' code: k / 255 becomes exactly k, and not slightly less.
    values = np.clip((image * image.dtype.type(255)).astype(np.float64), 0, 255)
    return cast(Array, np.rint(values) if output == "round" else np.trunc(values))


def _psnr(x: Array, y: Array) -> float:
    error = float(np.mean(np.square(x - y)))
    return MAX_PSNR if error == 0 else min(10 * math.log10(255**2 / error), MAX_PSNR)


def _plane_ssim(x: Array, y: Array, shrink: int, mode: str) -> float:
    x, y = _shrunk(x, shrink), _shrunk(y, shrink)
    if mode == "padded":
        x, y = np.pad(x, _MARGIN), np.pad(y, _MARGIN)
    return _ssim(x, y)


def _shrunk(plane: Array, factor: int) -> Array:
    """Return a plane down-sampled as in Wang's ssim.m: imfilter(ones(f) / f², 'symmetric'), then every f-th pixel."""
    if factor == 1:
        return np.ascontiguousarray(plane)
    centre = (factor - 1) // 2  # MATLAB's centre of an even filter
    means = cv2.blur(
        np.ascontiguousarray(plane), (factor, factor), anchor=(centre, centre), borderType=cv2.BORDER_REFLECT
    )
    return np.ascontiguousarray(means[::factor, ::factor])


def _ssim(x: Array, y: Array) -> float:
    """Return the mean SSIM over the valid region (Wang et al., TIP 2004, eq. 13).

    Only the sum of the two variances is computed, since SSIM does not need them separately. Strips of rows limit the
    memory and fit into the processor's cache.
    """
    rows, columns = (int(length) - 2 * _MARGIN for length in x.shape)
    strips = [slice(top, top + _STRIP + 2 * _MARGIN) for top in range(0, rows, _STRIP)]
    return sum(float(_ssim_map(x[strip], y[strip]).sum()) for strip in strips) / (rows * columns)


def _ssim_map(x: Array, y: Array) -> Array:
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    product = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    covariance = _local_mean(x * y) - product
    variances = _local_mean(x * x + y * y) - squares
    return (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))


def _local_mean(values: Array) -> Array:
    """Return the Gaussian mean around every pixel of the valid region."""
    return cast(Array, cv2.sepFilter2D(values, cv2.CV_64F, _WINDOW, _WINDOW)[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN])


def bootstrap_interval(
    values: NDArray[np.floating[Any]], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean: the 2.5th and 97.5th percentiles of the means of resamples.

    Args:
        values: ``(n,)``, one score per image; at least one.
        resamples: Number of resamples, each of n scores drawn with replacement.
        seed: Seed of the resampling.

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
