"""Structural similarity (SSIM) as a differentiable loss."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

RADIUS = 5
"""Radius of the Gaussian window in pixels; the side of the window is 11."""

SIGMA = 1.5
"""Standard deviation of the Gaussian window in pixels."""


def structural_similarity(derained: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the mean structural similarity (SSIM) over images, channels and pixels; 1 for equal images.

    Computed in float32 or wider, also under autocast. Images are padded with zeros, so that pixels at the border count.

    Args:
        derained: Images in about [0, 1].
        clean: Images in [0, 1].

    References:
        PReNet (Ren et al., CVPR 2019), as computed by their code: 11×11 Gaussian window of σ = 1.5, zero padding of 5,
        C1 = 0.01², C2 = 0.03²; PLNLIN's authors use the same. SSIM: Wang et al., IEEE TIP 2004, eq. 13.

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> round(float(structural_similarity(image, image)), 6)
        1.0
    """
    with torch.autocast(derained.device.type, enabled=False):
        dtype = torch.promote_types(derained.dtype, torch.float32)
        x, y = derained.to(dtype), clean.to(dtype)
        moments = _gaussian_mean(torch.cat((x, y, x * x, y * y, x * y), dim=1))
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments.chunk(5, dim=1)
        product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
        similarity = (2 * product + 0.01**2) * (2 * (mean_xy - product) + 0.03**2)
        similarity = similarity / ((squares + 0.01**2) * (mean_xx + mean_yy - squares + 0.03**2))
        return similarity.mean()


def _gaussian_mean(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return the Gaussian mean around each pixel, with zeros outside the image.

    On a GPU, the gradient of zero padding is deterministic; that of reflection padding is not.
    """
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=images.dtype, device=images.device)
    window = torch.exp(offsets.square() / (-2 * SIGMA**2))
    window = (window / window.sum()).expand(images.shape[1], 1, -1)
    columns = F.conv2d(images, window[..., None], padding=(RADIUS, 0), groups=images.shape[1])
    return F.conv2d(columns, window[..., None, :], padding=(0, RADIUS), groups=images.shape[1])
