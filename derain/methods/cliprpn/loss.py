"""What CLIP-RPN is trained by: a reconstruction loss whose exponent grows, and masks of rain."""

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
    """Exponent of the loss at a share of the training.

    Args:
        progress: Optimiser steps done over all steps, τ/T in [0, 1].
        beta: Exponent at the start.
        eta: Growth until the end.

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
    """Dynamic loss scheduling (DLS): mean of the error to the power of ``exponent(progress)``.

    The gradient of ``|e|^p`` is infinite at e = 0 for p < 1. ``shift`` takes ``(|e| + 1e-6)^p`` (below 0.1 % off for
    errors above 1/255, gradient 0 at 0); ``root`` takes ``(e² + 1e-6)^(p/2)``, which is smooth. Computed in float32 at
    least, whatever autocast says.

    Args:
        derained: In [0, 1] or a little beyond.
        clean: In [0, 1].
        power: The exponent.
        smoothing: What keeps the gradient finite.

    References:
        CLIP-RPN, eq. 14.

    Example:
        >>> round(float(scheduled_loss(torch.full((2, 2), 0.5), torch.zeros(2, 2), 2.0)), 4)
        0.25
    """
    error = _exact(derained) - _exact(clean)
    base = error.abs() + 1e-6 if smoothing == "shift" else (error.square() + 1e-6).sqrt()
    return base.pow(power).mean()


def reconstruction_loss(
    derained: Float[Tensor, "*shape"],
    clean: Float[Tensor, "*shape"],
    kind: Reconstruction,
    power: float,
    smoothing: Smoothing = "shift",
) -> Float[Tensor, ""]:
    """One of the losses that Table 11 of CLIP-RPN compares; ``power`` concerns ``dls`` alone, Huber's δ is 1."""
    if kind == "dls":
        return scheduled_loss(derained, clean, power, smoothing)
    if kind == "l1":
        return F.l1_loss(_exact(derained), _exact(clean))
    return (F.mse_loss if kind == "l2" else F.huber_loss)(_exact(derained), _exact(clean))


def rain_mask(
    rainy: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"], threshold: float = 0.1
) -> Float[Tensor, "b 1 h w"]:
    """Where there is rain: 1 where any channel differs by more than ``threshold``, else 0.

    References:
        CLIP-RPN, eq. 4; that any channel suffices is our reading.
    """
    return ((rainy - clean).abs().amax(1, keepdim=True) > threshold).to(rainy.dtype)


def mask_loss(
    logits: list[Float[Tensor, "b 1 _ _"]],
    mask: Float[Tensor, "b 1 h w"],
    scaling: MaskScaling = "nearest",
) -> list[Float[Tensor, ""]]:
    """Binary cross-entropy of the mask that each level predicts.

    Args:
        logits: Before the sigmoid, of levels at 1/2, 1/4, … of the padded image, in any order.
        mask: The true mask; it is padded as the network pads the image.
        scaling: How the true mask comes to a level's size: ``nearest`` keeps it binary and its share of rain,
            ``area`` is the share of rain in a cell, ``max`` whether any of its pixels has rain.

    References:
        CLIP-RPN, eq. 5, and the sum of eq. 15.
    """
    mask = pad_to_multiple(_exact(mask), 8)
    losses = []
    for level in logits:
        factor = mask.shape[2] // level.shape[2]
        if scaling == "nearest":
            target = mask[..., ::factor, ::factor]
        else:
            target = (F.avg_pool2d if scaling == "area" else F.max_pool2d)(mask, factor)
        losses.append(F.binary_cross_entropy_with_logits(_exact(level), target))
    return losses


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
