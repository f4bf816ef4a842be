"""Losses of CLIP-RPN: a reconstruction loss with a growing exponent, and rain masks."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.nn.padding import pad_to_multiple

Reconstruction = Literal["dls", "l1", "l2", "huber"]
Smoothing = Literal["shift", "root"]
MaskScaling = Literal["nearest", "area", "max"]


def exponent(progress: float, beta: float = 0.8, eta: float = 2.3) -> float:
    """Return the exponent of the loss at a point of the training.

    Args:
        progress: Optimiser steps done over all steps, τ/T in [0, 1].
        beta: Exponent at the start.
        eta: Increase until the end.

    References:
        CLIP-RPN, eq. 14 with its linear f(τ) = τ.

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
    """Return the mean of the absolute error to the power of ``exponent(progress)``: dynamic loss scheduling (DLS).

    The gradient of ``|e|^p`` is infinite at e = 0 for p < 1. ``shift`` computes ``(|e| + 1e-6)^p``: its error is below
    0.1 % for ``|e|`` above 1/255, its gradient at 0 is 0. ``root`` computes ``(e² + 1e-6)^(p/2)``, which is smooth.
    Computed in float32 or wider, also under autocast.

    Args:
        derained: In about [0, 1].
        clean: In [0, 1].
        power: The exponent.
        smoothing: How the gradient is kept finite.

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
    """Return a loss of Table 11 of CLIP-RPN; ``power`` and ``smoothing`` are of ``dls`` alone, Huber's δ is 1."""
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
    """Return the mask of rain: 1 where any channel differs by more than ``threshold``, else 0.

    References:
        CLIP-RPN, eq. 4; "any channel" is our reading.
    """
    return ((rainy - clean).abs().amax(1, keepdim=True) > threshold).to(rainy.dtype)


def mask_loss(
    logits: list[Float[Tensor, "b 1 _ _"]],
    mask: Float[Tensor, "b 1 h w"],
    scaling: MaskScaling = "nearest",
) -> list[Float[Tensor, ""]]:
    """Return the binary cross-entropy of the mask that each level predicts.

    Args:
        logits: Logits of levels at 1/2, 1/4, … of the padded image, in any order.
        mask: True mask; it is padded as the network pads the image.
        scaling: How the true mask is downscaled: ``nearest`` keeps it binary with the same share of rain; ``area`` is
            the share of rain in each cell; ``max`` is 1 if any pixel of the cell has rain.

    References:
        CLIP-RPN, eq. 5, and the sum of eq. 15.
    """
    mask = pad_to_multiple(_widened(mask), 8)
    losses = []
    for level in logits:
        factor = mask.shape[2] // level.shape[2]
        if scaling == "nearest":
            target = mask[..., ::factor, ::factor]
        elif scaling == "area":
            target = F.avg_pool2d(mask, factor)
        else:
            target = F.max_pool2d(mask, factor)
        losses.append(F.binary_cross_entropy_with_logits(_widened(level), target))
    return losses


def _widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
