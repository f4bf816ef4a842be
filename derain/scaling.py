"""Rain removal from large photos: the rain is estimated on a reduced photo and subtracted at full size."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MIN_REDUCED_SIDE = 1000
"""Smallest shorter side of a photo after it was reduced automatically, in pixels (see ``benchmarks/scale.py``)."""


def automatic_factor(height: int, width: int) -> int:
    """Return the factor by which a photo is reduced with ``scale`` ``auto``; height and width are in pixels.

    It is 1 if the shorter side is below 2000 pixels; otherwise, it reduces that side to 1000 to 1500 pixels.

    Example:
        >>> automatic_factor(1500, 2000), automatic_factor(4000, 6000)
        (1, 4)
    """
    return max(1, min(height, width) // MIN_REDUCED_SIDE)


def reduce(image: Float[Tensor, "c h w"], factor: int) -> Float[Tensor, "c h2 w2"]:
    """Return an image whose sides are divided by a factor and rounded up; each pixel is the mean over its area.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), 2)
        tensor([[[4.]]])
    """
    height, width = image.shape[1:]
    return F.interpolate(image[None], (-(-height // factor), -(-width // factor)), mode="area")[0]


def enlarge(image: Float[Tensor, "c h w"], height: int, width: int) -> Float[Tensor, "c h2 w2"]:
    """Return an image enlarged to a height and width in pixels by bicubic interpolation, which may overshoot."""
    return F.interpolate(image[None], (height, width), mode="bicubic", align_corners=False)[0]


def subtract_rain(
    rainy: Float[Tensor, "3 h w"],
    reduced: Float[Tensor, "3 h2 w2"],
    derained: Float[Tensor, "3 h2 w2"],
    strength: float = 1.0,
) -> Float[Tensor, "3 h w"]:
    """Return ``clip(rainy - strength · enlarge(reduced - derained), 0, 1)``: details of the rainy image are kept.

    Args:
        rainy: Rainy image in [0, 1].
        reduced: Input of the method: the same image, reduced or at full size.
        derained: Result of the method for ``reduced``.
        strength: Share of the rain that is removed, from 0 to 1.
    """
    removed = reduced - derained
    if removed.shape != rainy.shape:
        removed = enlarge(removed, *rainy.shape[1:])
    return removed.mul_(-strength).add_(rainy).clamp_(0, 1)  # in place, since new memory takes longer than arithmetic
