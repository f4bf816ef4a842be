"""Restormer: attention between channels, gated feed-forward, a four-level encoder-decoder.

Zamir et al., Restormer: Efficient Transformer for High-Resolution Image Restoration, CVPR 2022. Parameters have the
names and shapes of the authors' checkpoints; the arithmetic is arranged for speed:

- Tensors are ``(b, h, w, c)``: a pixel is normalised along contiguous memory, and convolutions see channels last.
- Without gradients, a map is worked on in strips of rows that stay in a processor's cache.
- Attention and the projection after it both act on the channels of a pixel: their matrices are multiplied first, and
  the pixels are passed over once. Not queries and keys are normalised, but their products.
- The hidden channels of the feed-forward network are padded by zeros to a multiple of 16, the width of vectors. A
  zero gates a zero, so they add nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.graphs import recorded, recorded_for_all_sizes
from derain.nn.padding import pad_to_multiple

STRIP_BYTES = {"cpu": 8 << 20, "gpu": 256 << 20}
"""Size of the widest map of a strip: of what stays in the cache of a core, and of what a GPU is busy with."""

Interact = Callable[[int, Float[Tensor, "b h w c"]], Float[Tensor, "b h w c"]]
"""What is done to the features of a level (0 is the finest) before they are upsampled."""


def pointwise(x: Float[Tensor, "b h w i"], weight: Float[Tensor, "o i 1 1"]) -> Float[Tensor, "b h w o"]:
    """A 1×1 convolution without bias."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1)


def spatial(x: Float[Tensor, "b h w i"], convolution: nn.Module) -> Float[Tensor, "b h w o"]:
    """A convolution over neighbouring pixels."""
    return cast(Tensor, convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def strips(x: Float[Tensor, "b h w c"], width: int) -> Iterator[tuple[slice, Tensor, slice]]:
    """Cuts a map into strips of rows, each with a row more above and below where there is one.

    Where no gradient is wanted, strips are so low that what is computed of them stays in a processor's cache, which
    is faster, and takes less memory everywhere. A compiled network fuses its operations instead.

    Args:
        x: The map.
        width: Channels of the widest map that is computed of a strip.

    Yields:
        The rows of the map, the strip with its neighbours, and which of its rows are its own.
    """
    if torch.is_grad_enabled() or recorded():
        yield slice(None), x, slice(None)
        return
    budget = STRIP_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
    rows = max(4, budget // (x.shape[0] * x.shape[2] * width * x.element_size()))
    for top in range(0, x.shape[1], rows):
        above = min(top, 1)
        yield slice(top, top + rows), x[:, top - above : top + rows + 1], slice(above, above + rows)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _least_norm(dtype: torch.dtype) -> float:
    """Return what norms are at least: 1e-12 as in `torch.nn.functional.normalize`, 1e-4 in float16.

    The gradient of a norm that is zero grows with the inverse, and float16 has to hold it, scaled.
    """
    return 1e-4 if dtype == torch.float16 else 1e-12


class Attention(nn.Module):
    """What self- and cross-attention share: similarities of channels, and how the values are mixed by them.

    Of each head, ``softmax(Q Kᵀ · temperature) V`` with queries and keys of unit length over the pixels. Similarities
    are summed up strip by strip, in float32 at least.

    Args:
        channels: Width of the features.
        heads: Groups of channels that attend among themselves; must divide ``channels``.

    Raises:
        DerainError: If ``heads`` does not divide ``channels``.

    References:
        Restormer, eq. 1; CLIP-RPN, eq. 9, where the temperature is 1/α.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise DerainError(f"{heads} heads do not divide {channels} channels; choose others, or another dim")
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def attend(self, strips: Iterable[Sequence[Tensor]]) -> Float[Tensor, "b h w c"]:
        """Attends, given queries, keys and values of strips of rows, ``(b, rows, w, channels)`` each."""
        values, products, squares = [], [], []
        for query, key, value in strips:
            values.append(value)
            with torch.autocast(value.device.type, enabled=False):
                products.append(self._products(query, key))
                squares.append(torch.stack([_exact(t).square().sum((1, 2)) for t in (query, key)]))
        value = torch.cat(values, dim=1) if len(values) > 1 else values[0]
        (b, h, w, c), heads = value.shape, len(self.temperature)
        with torch.autocast(value.device.type, enabled=False):
            q, k = torch.stack(squares).sum(0).clamp_min(_least_norm(query.dtype) ** 2).sqrt().reshape(2, b, heads, -1)
            cosines = torch.stack(products).sum(0) / (q[..., :, None] * k[..., None, :])
            attention = (cosines * self.temperature).softmax(-1)  # (b, heads, d, d)
            projection = self.project_out.weight.reshape(c, heads, -1).transpose(0, 1)
            matrix = (projection @ attention).transpose(2, 3).reshape(b, c, c)
        mixed: Tensor = value.flatten(1, 2) @ matrix.to(value.dtype)
        return mixed.reshape(b, h, w, c)

    def _products(self, query: Tensor, key: Tensor) -> Float[Tensor, "b heads d d"]:
        """Products of channels, summed over the pixels: in float16 they could overflow."""
        if query.dtype == torch.float16:
            query, key = query.float(), key.float()
        b, h, w, _ = query.shape
        q, k = (t.reshape(b, h * w, len(self.temperature), -1).permute(0, 2, 3, 1) for t in (query, key))
        return _exact(q @ k.transpose(2, 3))


class SelfAttention(Attention):
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
        super().__init__(channels, heads)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Mixes the channels."""
        return self.attend(
            spatial(pointwise(strip, self.qkv.weight), self.qkv_dwconv)[:, own].chunk(3, dim=-1)
            for _, strip, own in strips(x, self.qkv.out_channels)
        )


class CrossAttention(Attention):
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
        super().__init__(channels, heads)
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Conv2d(channels, channels, 1, bias=False))
            depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            self.add_module(f"{name}_dwconv", depthwise)

    def forward(
        self,
        query: Float[Tensor, "b h w c"],
        key: Float[Tensor, "b h w c"],
        value: Float[Tensor, "b h w c"],
    ) -> Float[Tensor, "b h w c"]:
        """Gathers ``value`` by the likeness of ``query`` and ``key``."""
        inputs = {"query": query, "key": key, "value": value}
        maps = [
            spatial(pointwise(x, self.get_parameter(f"{name}.weight")), self.get_submodule(f"{name}_dwconv"))
            for name, x in inputs.items()
        ]
        return self.attend([maps])


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

    def kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the three convolutions, the hidden channels filled up by zeros to a multiple of 16."""
        if recorded_for_all_sizes():  # ONNX wants weights that are constants
            return self.project_in.weight, self.dwconv.weight, self.project_out.weight
        idle = -self.project_out.in_channels % 16

        def padded(weight: Tensor) -> Tensor:
            halves = weight.reshape(2, -1, *weight.shape[1:])
            return F.pad(halves, (0, 0, 0, 0, 0, 0, 0, idle)).flatten(0, 1)

        project_out = F.pad(self.project_out.weight, (0, 0, 0, 0, 0, idle))
        return padded(self.project_in.weight), padded(self.dwconv.weight), project_out

    def forward(self, x: Float[Tensor, "b h w c"], kernels: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "b h w c"]:
        """Transforms every pixel with its neighbours, by the ``kernels()``."""
        project_in, depthwise, project_out = kernels
        hidden = pointwise(x, project_in).permute(0, 3, 1, 2)
        gate, gated = F.conv2d(hidden, depthwise, padding=1, groups=len(depthwise)).permute(0, 2, 3, 1).chunk(2, dim=-1)
        opened = F.gelu(gate)
        return pointwise(opened * gated if torch.is_grad_enabled() else opened.mul_(gated), project_out)


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
        if torch.is_grad_enabled() or recorded():
            return cast(Tensor, x + self.ffn(self.norm2(x), self.ffn.kernels()))
        kernels = self.ffn.kernels()
        out = torch.empty_like(x)
        for rows, strip, own in strips(x, len(kernels[0])):
            torch.add(x[:, rows], self.ffn(self.norm2(strip), kernels)[:, own], out=out[:, rows])
        return out


class Downsample(nn.Module):
    """Halves the resolution and doubles the channels: 3×3 convolution, pixel-unshuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Goes a level down."""
        x = spatial(x, self.body[0])
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4).flatten(3)


class Upsample(nn.Module):
    """Doubles the resolution and halves the channels: 3×3 convolution, pixel-shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Goes a level up."""
        x = spatial(x, self.body[0])
        b, h, w, c = x.shape
        return x.reshape(b, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


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
        if len(blocks) != 4 or len(heads) != 4:
            raise DerainError(f"blocks {list(blocks)}, heads {list(heads)}: give four numbers each, one a level")

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
        padded = pad_to_multiple(rainy, 8).permute(0, 2, 3, 1).contiguous()
        level1 = self.encoder_level1(self.patch_embed(padded))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        x = interact(3, self.latent(self.down3_4(level3)))
        x = pointwise(torch.cat((self.up4_3(x), level3), dim=-1), self.reduce_chan_level3.weight)
        x = interact(2, self.decoder_level3(x))
        x = pointwise(torch.cat((self.up3_2(x), level2), dim=-1), self.reduce_chan_level2.weight)
        x = interact(1, self.decoder_level2(x))
        x = torch.cat((self.up2_1(x), level1), dim=-1)
        x = spatial(self.refinement(self.decoder_level1(x)), self.output) + padded
        return x[:, :height, :width].permute(0, 3, 1, 2)
