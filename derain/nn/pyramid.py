"""Blocks of pyramid vision transformers, for maps ``(b, h, w, c)`` whose pixels are the tokens.

Wang et al., Pyramid Vision Transformer, ICCV 2021, and PVT v2, Computational Visual Media 2022.
"""

from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn

from derain.nn.normalization import LayerNorm

EPSILON = 1e-6
"""Epsilon of the layer normalisations before attention, before the feed-forward network and after the last block.

Those in `Embedding` and `ReducedAttention` have PyTorch's default of 1e-5.
"""

Map = Float[Tensor, "b _ _ _"]
"""Map ``(b, h, w, c)``."""


def convolve(x: Map, convolution: nn.Module) -> Map:
    """Apply a convolution module to a channels-last map."""
    return cast(Tensor, convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Embedding(nn.Module):
    """Overlapping patch embedding: strided convolution and layer normalisation.

    Args:
        channels: Number of channels of the input.
        width: Number of channels of the output.
        kernel: Side of the kernel, odd.
        stride: Stride of the convolution.

    Shape:
        ``(b, h, w, channels)`` → ``(b, ⌈h / stride⌉, ⌈w / stride⌉, width)``.

    References:
        PVT v2, overlapping patch embedding.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
        self.norm = LayerNorm(width)

    def forward(self, x: Map) -> Map:
        """Embed a map."""
        return cast(Tensor, self.norm(convolve(x, self.conv)))


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b heads n d"]:
    """Split the channels of tokens among heads of ``d = c / heads`` channels."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class ReducedAttention(nn.Module):
    """Attention whose keys and values are computed from a downsampled map.

    Args:
        width: Number of channels.
        heads: Number of heads; must divide ``width``.
        reduction: Factor by which the map is downsampled along each side; 1 for no downsampling.

    Shape:
        ``(b, h, w, width)`` → same; ``h, w >= reduction``.

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
        """Apply the attention."""
        query = split_heads(self.query(x).flatten(1, 2), self.heads)
        reduced = self.norm(convolve(x, self.reduce)) if self.reduction > 1 else x
        key, value = (split_heads(part, self.heads) for part in self.key_value(reduced).flatten(1, 2).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return cast(Tensor, self.project(attended.reshape(x.shape)))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: 0, and those of attention, which thop misses."""
        reduced_pixels = (output.shape[1] // self.reduction) * (output.shape[2] // self.reduction)
        return 0, 2 * output.numel() * reduced_pixels


class FeedForward(nn.Module):
    """Feed-forward network with a 3×3 depth-wise convolution before its GELU.

    Args:
        width: Number of channels.
        expansion: Hidden channels divided by ``width``.

    Shape:
        ``(b, h, w, width)`` → same.

    References:
        PVT v2, convolutional feed-forward network.
    """

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * width
        self.project_in = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project_out = nn.Linear(hidden, width)

    def forward(self, x: Map) -> Map:
        """Apply the network."""
        return cast(Tensor, self.project_out(F.gelu(convolve(self.project_in(x), self.depthwise))))


class Block(nn.Module):
    """Transformer block: attention and feed-forward network, each with pre-normalisation and a residual connection.

    Args:
        width: Number of channels.
        attention: Attention module, ``(b, h, w, width)`` → same.
        expansion: Hidden channels of the feed-forward network divided by ``width``.
        drop: Probability that training skips a residual branch for an image (stochastic depth).

    Shape:
        ``(b, h, w, width)`` → same.
    """

    def __init__(self, width: int, attention: nn.Module, expansion: int, drop: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, EPSILON)
        self.attention = attention
        self.norm2 = LayerNorm(width, EPSILON)
        self.feed_forward = FeedForward(width, expansion)
        self.drop = DropPath(drop)

    def forward(self, x: Map) -> Map:
        """Apply the block."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return cast(Tensor, x + self.drop(self.feed_forward(self.norm2(x))))
