"""Restormer: attention between channels, gated feed-forward, a four-level encoder-decoder.

Zamir et al., Restormer: Efficient Transformer for High-Resolution Image Restoration, CVPR 2022. Parameters have the
names and shapes of the authors' checkpoints; the arithmetic is arranged for speed:

- Tensors are ``(b, h, w, c)``. A 1×1 convolution is then one matrix product over all pixels, and a pixel is
  normalised along contiguous memory.
- Attention and the projection after it both act on the channels of a pixel: their matrices are multiplied first, and
  the pixels are passed over once. Not queries and keys are normalised, but their products.
- The hidden channels of the feed-forward network are padded by zeros to a multiple of 16, the width of vectors. A
  zero gates a zero, so they add nothing.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Interact = Callable[[int, Float[Tensor, "b h w c"]], Float[Tensor, "b h w c"]]
"""What is done to the features of a level (0 is the finest) before they are upsampled."""


def pointwise(x: Float[Tensor, "b h w i"], convolution: nn.Conv2d) -> Float[Tensor, "b h w o"]:
    """A 1×1 convolution without bias, as a matrix product."""
    return F.linear(x, convolution.weight.flatten(1))


def spatial(x: Float[Tensor, "b h w i"], convolution: nn.Conv2d) -> Float[Tensor, "b h w o"]:
    """A convolution over neighbouring pixels."""
    return cast(Tensor, convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def attend(
    query: Float[Tensor, "b h w c"],
    key: Float[Tensor, "b h w c"],
    value: Float[Tensor, "b h w c"],
    temperature: Float[Tensor, "heads 1 1"],
    projection: Float[Tensor, "o c 1 1"],
) -> Float[Tensor, "b h w o"]:
    """Attention between channels, and the projection of its result.

    Of each head, ``softmax(Q Kᵀ · temperature) V`` with queries and keys of unit length over the pixels; the
    similarities are computed in float32 at least.

    References:
        Restormer, eq. 1; CLIP-RPN, eq. 9, where the temperature is 1/α.
    """
    heads, pixels = len(temperature), query.shape[1] * query.shape[2]
    q, k = (t.reshape(len(t), pixels, heads, -1).permute(0, 2, 3, 1) for t in (query, key))  # (b, heads, d, pixels)
    exact = torch.promote_types(q.dtype, torch.float32)
    lengths = [torch.linalg.vector_norm(t, dim=-1, dtype=exact).clamp_min(1e-12) for t in (q, k)]
    with torch.autocast(q.device.type, enabled=False):
        cosine = (q @ k.transpose(2, 3)).to(exact) / (lengths[0][..., :, None] * lengths[1][..., None, :])
        attention = (cosine * temperature).softmax(-1)  # (b, heads, d, d)
        matrix = projection.flatten(1).unflatten(1, (heads, -1)).transpose(0, 1).to(exact) @ attention  # (b, heads, o, d)
    matrix = matrix.permute(0, 1, 3, 2).flatten(1, 2)  # (b, c, o)
    return (value.flatten(1, 2) @ matrix.to(value.dtype)).unflatten(1, query.shape[1:3])


class SelfAttention(nn.Module):
    """Attention of the channels to each other ("MDTA").

    Args:
        channels: Width of the features.
        heads: Groups of channels that attend among themselves; must divide ``channels``.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        Restormer, section 3.1, eq. 1.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Mixes the channels."""
        query, key, value = spatial(pointwise(x, self.qkv), self.qkv_dwconv).chunk(3, dim=-1)
        return attend(query, key, value, self.temperature, self.project_out.weight)


class CrossAttention(nn.Module):
    """Attention of one map's channels to another's.

    Args:
        channels: Width of the features.
        heads: Groups of channels; must divide ``channels``.

    Shape:
        Three times ``(b, h, w, channels)`` → the same once.

    References:
        CLIP-RPN, eqs. 8 and 9, Figure 1(c).
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        for name in ("query", "key", "value"):
            depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            self.add_module(name, nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), depthwise))
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(
        self,
        query: Float[Tensor, "b h w c"],
        key: Float[Tensor, "b h w c"],
        value: Float[Tensor, "b h w c"],
    ) -> Float[Tensor, "b h w c"]:
        """Gathers ``value`` by the likeness of ``query`` and ``key``."""
        maps = zip((query, key, value), (self.query, self.key, self.value), strict=True)
        q, k, v = (spatial(pointwise(x, mix[0]), mix[1]) for x, mix in maps)  # type: ignore[index]
        return attend(q, k, v, self.temperature, self.project_out.weight)


class GatedFeedForward(nn.Module):
    """Two depth-wise convolutions, one gating the other ("GDFN").

    Args:
        channels: Width of the features.
        expansion: Hidden width over ``channels``; rounded down.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        Restormer, section 3.2, eq. 2.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)
        self.idle = -hidden % 16

    def _padded(self, weight: Float[Tensor, "twice i kh kw"]) -> Float[Tensor, "padded i kh kw"]:
        return F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, 0, 0, 0, 0, self.idle)).flatten(0, 1)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Transforms every pixel with its neighbours."""
        hidden = F.linear(x, self._padded(self.project_in.weight).flatten(1))
        kernel = self._padded(self.dwconv.weight)
        hidden = F.conv2d(hidden.permute(0, 3, 1, 2), kernel, padding=1, groups=len(kernel)).permute(0, 2, 3, 1)
        gate, gated = hidden.chunk(2, dim=-1)
        return F.linear(F.gelu(gate) * gated, F.pad(self.project_out.weight.flatten(1), (0, self.idle)))


class Norm(nn.Module):
    """Normalisation of every pixel over its channels, under the authors' name of its parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Normalises."""
        return cast(Tensor, self.body(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward network, each after a normalisation and beside a short cut.

    Args:
        channels: Width of the features.
        heads: Heads of the attention.
        expansion: Of the feed-forward network.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = Norm(channels)
        self.attn = SelfAttention(channels, heads)
        self.norm2 = Norm(channels)
        self.ffn = GatedFeedForward(channels, expansion)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Transforms features."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.ffn(self.norm2(x)))


class Downsample(nn.Module):
    """Halves the resolution and doubles the channels: 3×3 convolution, pixel-unshuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Goes a level down."""
        x = spatial(x, self.body[0])  # type: ignore[arg-type]
        return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(3)


class Upsample(nn.Module):
    """Doubles the resolution and halves the channels: 3×3 convolution, pixel-shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Goes a level up."""
        x = spatial(x, self.body[0])  # type: ignore[arg-type]
        return x.unflatten(3, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


class PatchEmbedding(nn.Module):
    """Image to features by a 3×3 convolution, under the authors' name of its parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 3, padding=1, bias=False)

    def forward(self, image: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b h w c"]:
        """Embeds."""
        return spatial(image, self.proj)


class Restormer(nn.Module):
    """The restoration network: four levels down, three up, refinement at full resolution.

    Args:
        dim: Channels at the finest level; they double at each level.
        blocks: Transformer blocks of the four levels; the decoder has the first three again.
        refinement: Blocks at full resolution at the end.
        heads: Attention heads of the four levels.
        expansion: Of the feed-forward networks.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, any ``h, w >= 1``: the image is padded to a multiple of 8, by
        reflection where it is large enough, else by its border.

    References:
        Restormer, Figure 2 and section 4; CLIP-RPN, Figure 1(d). 26,126,644 parameters by default.
    """

    def __init__(
        self,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
    ) -> None:
        super().__init__()

        def level(channels: int, place: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(channels, heads[place], expansion) for _ in range(count)))

        self.patch_embed = PatchEmbedding(dim)
        self.encoder_level1 = level(dim, 0, blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = level(2 * dim, 1, blocks[1])
        self.down2_3 = Downsample(2 * dim)
        self.encoder_level3 = level(4 * dim, 2, blocks[2])
        self.down3_4 = Downsample(4 * dim)
        self.latent = level(8 * dim, 3, blocks[3])
        self.up4_3 = Upsample(8 * dim)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)
        self.decoder_level3 = level(4 * dim, 2, blocks[2])
        self.up3_2 = Upsample(4 * dim)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder_level2 = level(2 * dim, 1, blocks[1])
        self.up2_1 = Upsample(2 * dim)
        self.decoder_level1 = level(2 * dim, 0, blocks[0])
        self.refinement = level(2 * dim, 0, refinement)
        self.output = nn.Conv2d(2 * dim, 3, 3, padding=1, bias=False)

    def forward(
        self, rainy: Float[Tensor, "b 3 h w"], interact: Interact = lambda level, features: features
    ) -> Float[Tensor, "b 3 h w"]:
        """Restores images; ``interact`` may change the features of levels 3, 2 and 1 before they are upsampled."""
        height, width = rainy.shape[2:]
        mode = "reflect" if min(height, width) > 7 else "replicate"
        padded = F.pad(rainy, (0, -width % 8, 0, -height % 8), mode).permute(0, 2, 3, 1).contiguous()
        level1 = self.encoder_level1(self.patch_embed(padded))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        x = interact(3, self.latent(self.down3_4(level3)))
        x = pointwise(torch.cat((self.up4_3(x), level3), dim=-1), self.reduce_chan_level3)
        x = interact(2, self.decoder_level3(x))
        x = pointwise(torch.cat((self.up3_2(x), level2), dim=-1), self.reduce_chan_level2)
        x = interact(1, self.decoder_level2(x))
        x = torch.cat((self.up2_1(x), level1), dim=-1)
        x = spatial(self.refinement(self.decoder_level1(x)), self.output) + padded
        return x[:, :height, :width].permute(0, 3, 1, 2)
