"""Losses of SSID-KD's semi-supervised stage: dark channel, total variation, divergence of features.

Cui et al., Semi-Supervised Image Deraining Using Knowledge Distillation, IEEE TCSVT 2022.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def dark_channel(images: Float[Tensor, "b c h w"], window: int) -> Float[Tensor, "b 1 h2 w2"]:
    """Return the smallest value over the channels and a square window around each pixel.

    Args:
        images: Images in any range.
        window: Side of the window in pixels; windows are cut off at the border. If ``window`` is even, height and
            width of the result are one pixel larger than those of the images.

    References:
        He et al., Single Image Haze Removal Using Dark Channel Prior, CVPR 2009, eq. 5.
    """
    negative = -images.amin(1, keepdim=True)  # the minimum is the negative of max pooling of negative values
    columns = F.max_pool2d(negative, (window, 1), stride=1, padding=(window // 2, 0))
    return -F.max_pool2d(columns, (1, window), stride=1, padding=(0, window // 2))


def dark_channel_loss(images: Float[Tensor, "b c h w"], window: int) -> Float[Tensor, ""]:
    """Return the sum of the dark channel of ``(images + 1) / 2``.

    The authors map images from [-1, 1] to [0, 1], although the results of their network are in [0, 1]. This halves the
    gradient. Their loss equals this one minus the number of values of the dark channel.

    Args:
        images: Images in about [0, 1].
        window: Side of the windows in pixels.

    References:
        The authors' code (``Loss/ECLoss.py``, ``train_Rain200H_real.py``).
    """
    return dark_channel((images + 1) / 2, window).sum()


def total_variation(images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the sum of absolute differences of neighbouring pixels; pixels left of and above the images are zeros.

    References:
        The authors' code (``Loss/TVLossL1.py``), whose convolutions pad images by zeros.
    """
    columns = torch.diff(F.pad(images, (1, 0)), dim=3).abs()
    rows = torch.diff(F.pad(images, (0, 0, 1, 0)), dim=2).abs()
    return columns.sum() + rows.sum()


def divergence(synthetic: Float[Tensor, "b c h w"], real: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the Kullback-Leibler divergence of the features of real images from those of synthetic images.

    At each pixel, the softmax over the channels turns the features into a distribution. The result is the mean of
    ``p_real (log p_real - log p_synthetic)`` over all values. Pixels at the same position are compared.

    Args:
        synthetic: Features of synthetic images.
        real: Features of real images.

    References:
        The authors' code (``train_Rain200H_real.py``).
    """
    return F.kl_div(synthetic.log_softmax(1), real.log_softmax(1), reduction="none", log_target=True).mean()
