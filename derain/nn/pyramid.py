"""Blocks of pyramid vision transformers, for maps ``(b, h, w, c)``, of which they see each pixel as a token.

Wang et al., Pyramid Vision Transformer, ICCV 2021 and PVT v2, Computational Visual Media 2022.
"""

from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn

from derain.nn.normalization import LayerNorm
from derain.nn.restormer import spatial

EPSILON = 1e-6
"""Added to variances by the layer normalisations of blocks and stages."""

Map = Float[Tensor, "b h w c"]


class Embedding(nn.Module):
    """Strided convolution to pixels of a coarser map, and layer normalisation.

    Args:
        channels: Number of channels of the input.
        width: Number of channels of the output.
        kernel: Side of the kernel, odd.
        stride: Its stride; a side of n pixels becomes ⌈n / stride⌉.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
        self.norm = LayerNorm(width)

    def forward(self, x: Map) -> Map:
        """Embed."""
        return cast(Tensor, self.norm(spatial(x, self.conv)))


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b heads n d"]:
    """Return the channels of each head."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class ReducedAttention(nn.Module):
    """Attention of pixels to a map of reduced size.

    Args:
        width: Number of channels.
        heads: Number of heads.
        reduction: Factor by which keys and values are smaller along each side.

    References:
        Wang et al., Pyramid Vision Transformer, ICCV 2021, eqs. 1 to 3.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        if reduction > 1:
            self.reduce = nn.Conv2d(width, width, reduction, reduction)
            self.norm = LayerNorm(width)
        self.reduction = reduction

    def forward(self, x: Map) -> Map:
        """Attend."""
        query = split_heads(self.query(x).flatten(1, 2), self.heads)
        reduced = self.norm(spatial(x, self.reduce)) if self.reduction > 1 else x
        key, value = (split_heads(part, self.heads) for part in self.key_value(reduced).flatten(1, 2).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return cast(Tensor, self.project(attended.reshape(x.shape)))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return multiplications that are not counted: of the attention matrices."""
        reduced = (output.shape[1] // self.reduction) * (output.shape[2] // self.reduction)
        return 0, 2 * output.numel() * reduced


class FeedForward(nn.Module):
    """Feed-forward network with a depth-wise convolution before its GELU."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * width
        self.project_in = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project_out = nn.Linear(hidden, width)

    def forward(self, x: Map) -> Map:
        """Apply the network."""
        return cast(Tensor, self.project_out(F.gelu(spatial(self.project_in(x), self.depthwise))))


class Block(nn.Module):
    """Attention and feed-forward network, each after normalisation, with a residual connection.

    Args:
        width: Number of channels.
        attention: The attention.
        expansion: Hidden channels of the feed-forward network divided by ``width``.
        drop: Probability in training that a residual is skipped, for each image.
    """

    def __init__(self, width: int, attention: nn.Module, expansion: int, drop: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, EPSILON)
        self.attention = attention
        self.norm2 = LayerNorm(width, EPSILON)
        self.feed_forward = FeedForward(width, expansion)
        self.drop = DropPath(drop)

    def forward(self, x: Map) -> Map:
        """Transform features."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return cast(Tensor, x + self.drop(self.feed_forward(self.norm2(x))))
