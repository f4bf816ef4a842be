"""Structural similarity that networks are trained by."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def structural_similarity(derained: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean structural similarity: 1 for equal images.

    Computed in float32 at least, whatever autocast says. Differs from the SSIM that results are reported in:
    it works on RGB, each channel for itself, and zeros surround the image, so that the borders count too.

    Args:
        derained: In about [0, 1].
        clean: In [0, 1].

    References:
        Ren et al., CVPR 2019, section 4.1, as their code computes it: 11×11 Gaussian window of σ = 1.5, zero
        padding of 5, C1 = 0.01², C2 = 0.03²; PLNLIN's authors have the same. SSIM: Wang et al., IEEE TIP 2004, eq. 13.

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> round(float(structural_similarity(image, image)), 6)
        1.0
    """
    with torch.autocast(derained.device.type, enabled=False):
        dtype = torch.promote_types(derained.dtype, torch.float32)
        x, y = derained.to(dtype), clean.to(dtype)
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.cat((x, y, x * x, y * y, x * y), dim=1)).chunk(5, dim=1)
        product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
        similarity = (2 * product + 0.01**2) * (2 * (mean_xy - product) + 0.03**2)
        similarity = similarity / ((squares + 0.01**2) * (mean_xx + mean_yy - squares + 0.03**2))
        return similarity.mean()


def _blur(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Gaussian mean around every pixel, of an 11×11 window with σ = 1.5; outside the image are zeros."""
    offsets = torch.arange(-5, 6, dtype=images.dtype, device=images.device)
    window = torch.exp(offsets.square() / -(2 * 1.5**2))
    window = (window / window.sum()).expand(images.shape[1], 1, -1)
    columns = F.conv2d(images, window[..., None], padding=(5, 0), groups=images.shape[1])
    return F.conv2d(columns, window[..., None, :], padding=(0, 5), groups=images.shape[1])
