"""Losses of PLNLIN and its discriminator."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.nn.ssim import structural_similarity

HIERARCHICAL = (0.1, 0.05, 0.02, 0.01)
"""Weights λ of eq. 11, the finest scale first."""

ADVERSARIAL = (0.0005, 0.001, 0.0025, 0.005)
"""Weights μ of eq. 12, the finest scale first."""

LossesByName = Mapping[str, Sequence[Tensor]]
"""Losses by name; a sequence has one loss per scale, the finest first."""


def pyramid(images: Float[Tensor, "b c h w"], scales: int) -> list[Tensor]:
    """Return the Gaussian pyramid of images: each level has half the size of the level before, rounded up.

    Levels have the precision of the images, also under autocast.

    Args:
        images: Images whose height and width are at least 3 at every level but the last.
        scales: Number of levels; the first one is the images themselves.

    References:
        Burt and Adelson, 1983, as OpenCV's ``pyrDown``: kernel (1, 4, 6, 4, 1) / 16 along both axes, reflected
        borders, every second pixel.

    Example:
        >>> [tuple(level.shape[2:]) for level in pyramid(torch.rand(1, 3, 21, 8), 3)]
        [(21, 8), (11, 4), (6, 2)]
    """
    window = images.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = torch.outer(window, window).expand(images.shape[1], 1, 5, 5)
    levels = [images]
    for _ in range(scales - 1):
        padded = F.pad(levels[-1], (2, 2, 2, 2), "reflect")
        with torch.autocast(images.device.type, enabled=False):
            levels.append(F.conv2d(padded, kernel, stride=2, groups=images.shape[1]))
    return levels


def hierarchical_losses(
    images: Sequence[Float[Tensor, "b 3 _ _"]], clean: Float[Tensor, "b 3 h w"]
) -> list[Float[Tensor, ""]]:
    """Return ``1 - SSIM`` between each image of the hierarchy and the clean image at the same size.

    Args:
        images: Images of the hierarchy, the finest first; each has half the size of the image before.
        clean: Clean images in [0, 1], at the size of the finest image.

    References:
        Wang et al., MM 2024, eq. 11. The paper does not say how the clean image is downscaled; derain uses a Gaussian
        pyramid.
    """
    targets = pyramid(clean, len(images))
    return [1 - structural_similarity(image, target) for image, target in zip(images, targets, strict=True)]


def relativistic_losses(
    higher: Sequence[Float[Tensor, "b 1 _ _"]], lower: Sequence[Float[Tensor, "b 1 _ _"]]
) -> list[Float[Tensor, ""]]:
    """Return the relativistic average loss of each scale.

    The loss is low if the ``higher`` logits exceed the mean of the ``lower`` logits, and the ``lower`` logits are below
    the mean of the ``higher`` logits. The generator's loss is ``relativistic_losses(derained, clean)``, that of
    the discriminator ``relativistic_losses(clean, derained)``.

    Both are computed in float32 or wider, also under autocast.

    Args:
        higher: Logits of the images that should score higher, by scale.
        lower: Logits of the images that should score lower, by scale, of the same shapes.

    References:
        Wang et al., MM 2024, eq. 8 (the generator's loss); Jolicoeur-Martineau, ICLR 2019.

    Example:
        >>> logits = [torch.zeros(1, 1, 4, 4)]
        >>> round(float(relativistic_losses(logits, logits)[0]), 4)  # 2 log 2
        1.3863
    """
    losses = []
    for higher_logits, lower_logits in zip(higher, lower, strict=True):
        with torch.autocast(higher_logits.device.type, enabled=False):
            above = higher_logits.to(torch.promote_types(higher_logits.dtype, torch.float32))
            below = lower_logits.to(torch.promote_types(lower_logits.dtype, torch.float32))
            losses.append(F.softplus(below.mean() - above).mean() + F.softplus(below - above.mean()).mean())
    return losses


def weighted_sum(losses_by_name: LossesByName, alpha: float, beta: float) -> Float[Tensor, ""]:
    """Return the weighted sum of losses.

    Args:
        losses_by_name: Losses with any of the names ``pixel``, ``hierarchical``, ``generator`` and ``discriminator``.
            If one of the last three names has fewer than four losses, these belong to the coarsest scales.
        alpha: Weight of the hierarchical losses.
        beta: Weight of the adversarial losses of generator and discriminator.

    References:
        Wang et al., MM 2024, eqs. 9, 11 and 12.

    Example:
        >>> round(float(weighted_sum({"pixel": [torch.tensor(0.2)], "generator": [torch.tensor(2.0)]}, 1.0, 1.0)), 4)
        0.21
    """
    weights: dict[str, tuple[float, Sequence[float]]] = {
        "pixel": (1.0, (1.0,)),
        "hierarchical": (alpha, HIERARCHICAL),
        "generator": (beta, ADVERSARIAL),
        "discriminator": (beta, ADVERSARIAL),
    }
    terms = []
    for name, losses in losses_by_name.items():
        weight, scale_weights = weights[name]
        for scale_weight, loss in zip(scale_weights[-len(losses) :], losses, strict=True):
            terms.append(weight * scale_weight * loss)
    return torch.stack(terms).sum()
