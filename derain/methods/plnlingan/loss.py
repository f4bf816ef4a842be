"""What PLNLIN and its discriminator are trained by."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.nn.ssim import structural_similarity

HIERARCHICAL = (0.1, 0.05, 0.02, 0.01)
"""λ of eq. 11, the finest scale first."""

ADVERSARIAL = (0.0005, 0.001, 0.0025, 0.005)
"""μ of eq. 12, the finest scale first."""

Parts = Mapping[str, Sequence[Tensor]]
"""Losses by name, one a scale."""


def pyramid(images: Float[Tensor, "b c h w"], scales: int) -> list[Tensor]:
    """The images, and each again at half of its size: a Gaussian pyramid, in their precision whatever autocast says.

    Args:
        images: Any, sides of at least 3 at every scale but the last.
        scales: How many.

    References:
        Burt and Adelson, 1983, as OpenCV's ``pyrDown`` has it: the window (1, 4, 6, 4, 1) / 16 along both sides,
        borders reflected, every second pixel.

    Example:
        >>> [tuple(one.shape[2:]) for one in pyramid(torch.rand(1, 3, 21, 8), 3)]
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
    """How dissimilar the hierarchy's images are to the clean image at their sizes, ``1 - SSIM`` each.

    Args:
        images: The finest first, each half as large as the one before.
        clean: In [0, 1], as large as the finest.

    References:
        Wang et al., MM 2024, eq. 11; that the clean image is made smaller by a Gaussian pyramid is its authors' habit.
    """
    targets = pyramid(clean, len(images))
    return [1 - structural_similarity(image, target) for image, target in zip(images, targets, strict=True)]


def relativistic_losses(
    higher: Sequence[Float[Tensor, "b 1 _ _"]], lower: Sequence[Float[Tensor, "b 1 _ _"]]
) -> list[Float[Tensor, ""]]:
    """By how much logits fail to be higher, or lower, than the others' mean, of each scale that is judged.

    The generator wants its logits higher than those of clean images: ``relativistic_losses(fake, real)``; the
    discriminator the reverse. Computed in float32 at least, whatever autocast says.

    Args:
        higher: What should be judged cleaner.
        lower: What should be judged less clean.

    References:
        Wang et al., MM 2024, eq. 8, is the generator's; Jolicoeur-Martineau, ICLR 2019, eqs. 12 and 13.

    Example:
        >>> logits = [torch.zeros(1, 1, 4, 4)]
        >>> round(float(relativistic_losses(logits, logits)[0]), 4)  # 2 log 2
        1.3863
    """
    losses = []
    for one, other in zip(higher, lower, strict=True):
        with torch.autocast(one.device.type, enabled=False):
            above, below = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (one, other))
            losses.append(F.softplus(below.mean() - above).mean() + F.softplus(below - above.mean()).mean())
    return losses


def weighted_sum(parts: Parts, alpha: float, beta: float) -> Float[Tensor, ""]:
    """The sum of losses by their weights.

    Args:
        parts: ``pixel``, ``hierarchical``, ``generator``, ``discriminator``: any of them. Where fewer scales than four
            are judged, they are the coarsest.
        alpha: Weight of the hierarchical losses.
        beta: Of the adversarial losses; the discriminator's have it too.

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
    for name, losses in parts.items():
        share, each = weights[name]
        terms += [share * weight * loss for weight, loss in zip(each[-len(losses) :], losses, strict=True)]
    return torch.stack(terms).sum()
