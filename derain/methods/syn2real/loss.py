"""Gaussian process that predicts the features of an image from those of labelled images.

Yasarla et al., Syn2Real Transfer Learning for Image Deraining using Gaussian Processes, CVPR 2020.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NOISE = 1.0
"""Variance of the noise of the Gaussian process."""
VARIANCE_WEIGHT = 0.33
"""Weight of the logarithm of the variance given the nearest examples."""
FAR_WEIGHT = 0.33e-6
"""Weight of the logarithm of the variance given the furthest examples, which is subtracted from the loss."""


class Posterior(NamedTuple):
    """Gaussian posterior of latent vectors.

    Attributes:
        mean: ``(b, d)``.
        variance: ``(b,)``; all elements of a vector have the same variance.
    """

    mean: Float[Tensor, "b d"]
    variance: Float[Tensor, " b"]


def posterior(latents: Float[Tensor, "b d"], examples: Float[Tensor, "b n d"], noise: float = NOISE) -> Posterior:
    """Return the posterior of a Gaussian process at each latent vector, given its own examples.

    With the kernel ``k(u, v) = u · v / (|u| |v|)``, the Gram matrix K of the examples F, and the vector c of the
    kernels of a latent vector z and each example, the mean is ``cᵀ (K + noise I)⁻¹ F`` and the variance
    ``k(z, z) - cᵀ (K + noise I)⁻¹ c + noise``. Both depend on z, and pass gradients to it.

    Args:
        latents: Latent vectors.
        examples: Latent vectors of labelled images, ``n`` for each of the ``latents``.
        noise: Variance of the noise.

    Returns:
        Mean and variance; NaN where a latent vector or its examples are not finite.

    References:
        The authors' code (``GP.py``).
    """
    units, example_units = F.normalize(latents, dim=-1), F.normalize(examples, dim=-1)
    cross = example_units @ units[:, :, None]
    gram = example_units @ example_units.mT
    covariance = gram + noise * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failure = torch.linalg.cholesky_ex(covariance)
    factor = factor.where(failure[:, None, None] == 0, torch.nan)  # fails only if examples are not finite
    weights = torch.cholesky_solve(cross, factor)
    mean = (weights.mT @ examples)[:, 0]
    return Posterior(mean, units.square().sum(-1) - (cross * weights).sum((1, 2)) + noise)


def gaussian_process_loss(
    latents: Float[Tensor, "b d"], labelled: Float[Tensor, "m d"], neighbours: int
) -> Float[Tensor, ""]:
    """Return the loss of latent vectors of unlabelled images.

    The posterior mean given the nearest examples is the pseudo ground truth. With the ``variance`` given the nearest
    and the ``far_variance`` given the furthest examples, the loss is the mean over the images of
    ``mean((z - mean)²) / variance + 0.33 log(variance) - 0.33e-6 log(far_variance)``.

    Args:
        latents: Latent vectors of unlabelled images.
        labelled: Latent vectors of labelled images.
        neighbours: Number of nearest and of furthest examples by the kernel. If there are fewer labelled vectors, both
            are all of them.

    References:
        The authors' code (``GP.py``, ``version1``; their comment says that it is the model of the conference paper).
    """
    similarity = F.normalize(latents.detach(), dim=-1) @ F.normalize(labelled, dim=-1).T
    count = min(neighbours, len(labelled))
    near = posterior(latents, labelled[similarity.topk(count).indices])
    far = posterior(latents, labelled[similarity.topk(count, largest=False).indices])
    error = (latents - near.mean).square().mean(-1) / near.variance
    return (error + VARIANCE_WEIGHT * near.variance.log() - FAR_WEIGHT * far.variance.log()).mean()
