"""Losses between a network's output and its target, by name."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.nn.ssim import structural_similarity

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of output and target, both ``(b, c, h, w)``, that returns the loss ``()``."""

CHARBONNIER_EPSILON = 1e-3


def charbonnier(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the mean of ``sqrt((output - target)² + ε²)`` with ε = 0.001.

    References:
        Zamir et al., MPRNet, CVPR 2021, as computed by their code: the mean over values, not the norm of an image.
    """
    return ((output - target).square() + CHARBONNIER_EPSILON**2).sqrt().mean()


def edge(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the Charbonnier loss of the Laplacians of output and target, see `laplacian`.

    References:
        Zamir et al., MPRNet, CVPR 2021, as computed by their code.
    """
    return charbonnier(laplacian(output), laplacian(target))


def laplacian(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return a level of the Laplacian pyramid: images minus their low-pass version, in float32 or wider.

    For the low-pass version, images are blurred, set to zero except in every second row and column, multiplied by 4,
    and blurred again. The 5×5 blur has weights (0.05, 0.25, 0.4, 0.25, 0.05) along each axis; borders are replicated.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    blurred = _blur(images)
    sampled = torch.zeros_like(blurred)
    sampled[..., ::2, ::2] = 4 * blurred[..., ::2, ::2]
    return images - _blur(sampled)


def _blur(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    channels = images.shape[1]
    window = images.new_tensor([0.05, 0.25, 0.4, 0.25, 0.05])
    kernel = torch.outer(window, window).expand(channels, 1, 5, 5)
    with torch.autocast(images.device.type, enabled=False):
        return F.conv2d(F.pad(images, (2, 2, 2, 2), "replicate"), kernel, groups=channels)


def fft(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the mean modulus of the difference of the two-dimensional discrete Fourier transforms.

    References:
        Chen et al., NeRD-Rain, CVPR 2024, section 3.4, as computed by their code: transforms are not normalised.
    """
    with torch.autocast(output.device.type, enabled=False):
        dtype = torch.promote_types(output.dtype, torch.float32)
        difference = torch.fft.fft2(output.to(dtype)) - torch.fft.fft2(target.to(dtype))
    modulus: Tensor = difference.abs()
    return modulus.mean()


def negative_ssim(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the negative SSIM, see `structural_similarity`."""
    return -structural_similarity(output, target)


def mean(output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Return the mean of an output that is itself a loss; the target is not used."""
    return output.mean()


LOSSES: Mapping[str, Loss] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "charbonnier": charbonnier,
    "edge": edge,
    "fft": fft,
    "ssim": negative_ssim,
    "mean": mean,
}
"""Losses by the name that configurations use."""
