"""JPEG compression artefacts of batches of images, computed on any device.

``jpeg_codec_differentiable`` of kornia is slower, and replaces rounding by smooth functions.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from kornia.color import rgb_to_ycbcr, ycbcr_to_rgb
from torch import Tensor

LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
"""Quantisation table of luma at quality 50, 8 × 8, row by row (ITU-T T.81, Table K.1)."""

CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
"""Quantisation table of chroma at quality 50, 8 × 8, row by row (ITU-T T.81, Table K.2)."""

MIDDLE = 128 / 255
"""Luma in [0, 1] that is subtracted before the transform: JPEG's level shift by 128."""


def _cosines() -> Float[Tensor, "64 64"]:
    """Return the matrix of the orthonormal discrete cosine transform of 8 × 8 blocks, flattened row by row."""
    position = torch.arange(8)
    matrix = torch.cos(math.pi / 16 * position[:, None] * (2 * position + 1)) / 2
    matrix[0] /= math.sqrt(2)
    return torch.kron(matrix, matrix)


COSINES = _cosines()


def jpeg(images: Float[Tensor, "b 3 h w"], quality: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """Return images with the artefacts of JPEG encoding with 4:2:0 chroma subsampling; not differentiable.

    Args:
        images: RGB images in [0, 1], of any size.
        quality: Quality of each image, as in libjpeg, 1 to 100.

    Returns:
        RGB images in [0, 1], not rounded to 8 bits.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    planes = rgb_to_ycbcr(padded)
    luma, chroma = planes[:, :1], planes[:, 1:]
    luma = _quantised(luma - MIDDLE, LUMA, quality) + MIDDLE
    chroma = _quantised(F.avg_pool2d(chroma, 2) - 0.5, CHROMA, quality) + 0.5  # kornia's chroma of grey is 0.5
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    return ycbcr_to_rgb(torch.cat((luma, chroma), 1))[:, :, :height, :width].clamp(0, 1)


def _quantised(
    planes: Float[Tensor, "b c h w"], table: tuple[int, ...], quality: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Round the coefficients of all 8 × 8 blocks to multiples of the table's values, scaled by the quality."""
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None]
    steps = ((torch.tensor(table, device=planes.device) * scale + 50) / 100).floor().clamp(1, 255)
    steps = steps[:, None, None, None] / 255
    cosines = COSINES.to(planes)
    count, channels, height, width = planes.shape
    blocks = planes.reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4).flatten(4)
    rounded = (blocks @ cosines.T).div_(steps).round_().mul_(steps)
    return (rounded @ cosines).view(*blocks.shape[:4], 8, 8).transpose(3, 4).reshape(planes.shape)
