"""Structural similarity as a loss of networks."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WINDOW = 11
"""Side of the Gaussian window (σ = 1.5) in pixels."""


def structural_similarity(derained: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the mean structural similarity (SSIM) of two batches; 1 for equal images.

    Computed in float32 or wider, also under autocast. Unlike the SSIM of the evaluation protocols, it compares the
    RGB channels separately and pads the images with zeros, so that pixels at the border count.

    Args:
        derained: Values of about [0, 1].
        clean: Values in [0, 1].

    References:
        Ren et al., CVPR 2019, section 4.1, as computed by their code: 11×11 Gaussian window of σ = 1.5, zero
        padding of 5, C1 = 0.01², C2 = 0.03²; PLNLIN's authors use the same. SSIM: Wang et al., IEEE TIP 2004, eq. 13.

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> round(float(structural_similarity(image, image)), 6)
        1.0
    """
    from kornia.metrics import ssim  # takes seconds to import, and only training needs it

    padding = [WINDOW // 2] * 4
    with torch.autocast(derained.device.type, enabled=False):
        dtype = torch.promote_types(derained.dtype, torch.float32)
        x = F.pad(derained.to(dtype), padding)
        y = F.pad(clean.to(dtype), padding)
        return ssim(x, y, WINDOW, eps=0.0, padding="valid").mean()
