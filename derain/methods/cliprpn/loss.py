"""Losses of CLIP-RPN: dynamic loss scheduling (DLS), and the loss on predicted rain masks."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.nn.padding import pad_to_multiple

Reconstruction = Literal["dls", "l1", "l2", "huber"]
"""Reconstruction losses, see `reconstruction_loss`."""

Smoothing = Literal["shift", "root"]
"""Ways to keep the gradient finite, see `scheduled_loss`."""

MaskScaling = Literal["nearest", "area", "max"]
"""Ways to downscale the true mask, see `mask_loss`."""


def exponent(progress: float, beta: float = 0.8, eta: float = 2.3) -> float:
    """Return the exponent of dynamic loss scheduling (DLS) at a point in training.

    Args:
        progress: Completed fraction of the optimiser steps, τ/T in [0, 1].
        beta: Exponent at the start.
        eta: Increase from start to end.

    References:
        CLIP-RPN, eq. 14, with the paper's linear f(τ) = τ.

    Example:
        >>> exponent(0.0), round(exponent(1.0), 3)
        (0.8, 3.1)
    """
    return beta + eta * progress


def scheduled_loss(
    derained: Float[Tensor, "*shape"],
    clean: Float[Tensor, "*shape"],
    power: float,
    smoothing: Smoothing = "shift",
) -> Float[Tensor, ""]:
    """Return the mean of ``|derained - clean|`` raised to the exponent of dynamic loss scheduling (DLS).

    The gradient of ``|e|^p`` is infinite at e = 0 for p < 1. ``shift`` computes ``(|e| + 1e-6)^p`` instead, with
    gradient 0 at e = 0; ``root`` computes ``(e² + 1e-6)^(p/2)``. Both are computed in float32 or wider, also under
    autocast.

    Args:
        derained: Derained images, about [0, 1].
        clean: Clean images in [0, 1].
        power: The exponent p, see `exponent`.
        smoothing: How the gradient is kept finite: ``shift`` or ``root``.

    References:
        CLIP-RPN, eq. 14.

    Example:
        >>> round(float(scheduled_loss(torch.full((2, 2), 0.5), torch.zeros(2, 2), 2.0)), 4)
        0.25
    """
    error = _widened(derained) - _widened(clean)
    magnitude = error.abs() + 1e-6 if smoothing == "shift" else (error.square() + 1e-6).sqrt()
    return magnitude.pow(power).mean()


def reconstruction_loss(
    derained: Float[Tensor, "*shape"],
    clean: Float[Tensor, "*shape"],
    kind: Reconstruction,
    power: float,
    smoothing: Smoothing = "shift",
) -> Float[Tensor, ""]:
    """Return a reconstruction loss of Table 11 of CLIP-RPN.

    Computed in float32 or wider, also under autocast.

    Args:
        derained: Derained images, about [0, 1].
        clean: Clean images in [0, 1].
        kind: ``dls``, see `scheduled_loss`; ``l1``; ``l2`` (mean squared error); ``huber`` with δ = 1.
        power: Exponent of ``dls``; the other losses ignore it.
        smoothing: Smoothing of ``dls``; the other losses ignore it.
    """
    if kind == "dls":
        return scheduled_loss(derained, clean, power, smoothing)
    derained, clean = _widened(derained), _widened(clean)
    if kind == "l1":
        return F.l1_loss(derained, clean)
    if kind == "l2":
        return F.mse_loss(derained, clean)
    return F.huber_loss(derained, clean)


def rain_mask(
    rainy: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"], threshold: float = 0.1
) -> Float[Tensor, "b 1 h w"]:
    """Return the rain mask: 1 where any channel differs by more than ``threshold``, else 0.

    Args:
        rainy: Rainy images in [0, 1].
        clean: Clean images in [0, 1].
        threshold: Difference in [0, 1].

    References:
        CLIP-RPN, eq. 4; "any channel" is our reading.
    """
    return ((rainy - clean).abs().amax(1, keepdim=True) > threshold).to(rainy.dtype)


def mask_loss(
    logits: list[Float[Tensor, "b 1 _ _"]],
    mask: Float[Tensor, "b 1 h w"],
    scaling: MaskScaling = "nearest",
) -> list[Float[Tensor, ""]]:
    """Return the binary cross-entropy of the predicted mask at each level, in float32 or wider.

    Args:
        logits: Logits of the predicted masks at 1/2, 1/4 and 1/8 of the padded image, in any order.
        mask: True rain mask at the size of the image, see `rain_mask`. It is padded here as the network pads the image.
        scaling: How the true mask is downscaled to a level: ``nearest`` takes the top left pixel of each cell, which
            keeps the mask binary; ``area`` takes the fraction of rainy pixels in the cell; ``max`` is 1 if any pixel
            of the cell is rainy.

    Returns:
        One loss per level, in the order of ``logits``.

    References:
        CLIP-RPN, eq. 5; eq. 15 sums the levels.
    """
    mask = pad_to_multiple(_widened(mask), 8)
    losses = []
    for level_logits in logits:
        factor = mask.shape[2] // level_logits.shape[2]
        if scaling == "nearest":
            target = mask[..., ::factor, ::factor]
        elif scaling == "area":
            target = F.avg_pool2d(mask, factor)
        else:
            target = F.max_pool2d(mask, factor)
        losses.append(F.binary_cross_entropy_with_logits(_widened(level_logits), target))
    return losses


def _widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
