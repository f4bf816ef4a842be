"""Conditional U-Net of IR-SDE and DA-CLIP: it estimates the noise in a state of the SDE.

Parameters have the names and shapes of the authors' checkpoints; the arithmetic is arranged for speed:

- Maps are channels last, so that normalisation and attention read the contiguous channels of a pixel.
- Upsampling and the convolution after it are one transposed convolution, with 4/9 of the multiplications.
- Linear attention multiplies its channel matrix by the output projection, and then the pixels by the product.
- Without gradients, some operations are in-place, and cross-attention to a single token is computed once for all
  pixels: the weight of that token is 1 at each pixel.
- Without gradients on a CPU, linear attention processes strips of rows that fit into the cache.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.graphs import compiling_or_exporting
from derain.nn.padding import pad_to_multiple

AttentionKind = Literal["linear", "none"]
"""Self-attention of a `ConditionalUNet`."""
HEAD = 32
"""Channels of an attention head."""
STRIP = 2048
"""Approximate number of pixels in a strip, whose queries, or keys and values, fit into the cache of a CPU core."""

Map = Float[Tensor, "_ _ _ _"]  # (b, c, h, w); channels and sizes change from layer to layer
Embedding = Float[Tensor, "_ _"]


class TimeFeatures(nn.Module):
    """Sines and cosines of the time, at frequencies from 1 down to 1e-4.

    Args:
        size: Number of features, even.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.count = size // 2

    def forward(self, times: Float[Tensor, " b"]) -> Embedding:
        """Return the features ``(b, size)`` of times ``t``."""
        powers = torch.arange(self.count, device=times.device, dtype=times.dtype) / max(1, self.count - 1)
        angles = times.reshape(-1)[:, None] * torch.exp(-math.log(10_000) * powers)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a pixel, with a gain and no bias.

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Map) -> Map:
        """Normalise every pixel."""
        gain = self.g.flatten()
        return F.layer_norm(x.permute(0, 2, 3, 1), gain.shape, gain).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Residual block of two convolutions without normalisation; the time scales and shifts the first one's output.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        time_size: Size of the time embedding.
    """

    def __init__(self, inputs: int, outputs: int, time_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_size, 2 * outputs))
        self.block1, self.block2 = nn.Sequential(), nn.Sequential()
        self.block1.add_module("proj", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        self.block2.add_module("proj", nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))
        self.res_conv = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Map, time: Embedding) -> Map:
        """Transform a map."""
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        y = self.block1(x)
        if torch.is_grad_enabled():
            y = F.silu(torch.addcmul(shift, y, scale + 1))
            y = F.silu(self.block2(y))
            return cast(Tensor, y + self.res_conv(x))
        y = F.silu(y.mul_(scale + 1).add_(shift), inplace=True)
        y = F.silu(self.block2(y), inplace=True)
        return y.add_(self.res_conv(x))


class LinearAttention(nn.Module):
    """Linear attention: its matrix is between channels, so its cost is linear in the number of pixels.

    Queries are a softmax over the channels of a head, keys a softmax over the pixels. Values are divided by the number
    of pixels, as in the authors' code.

    Args:
        channels: Channels of the map.
        heads: Number of attention heads; each has 32 channels.
    """

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        hidden = heads * HEAD
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden, channels, 1), ChannelNorm(channels))

    def forward(self, x: Map, content: Embedding | None = None) -> Map:
        """Apply attention; the content is ignored."""
        strips = self._strips(x)
        averages = [self._average(strip) for strip in strips]
        parts = torch.stack([part for part, _ in averages])
        log_sums = torch.stack([log_sum for _, log_sum in averages])
        average = (parts * log_sums.softmax(0)).sum(0)  # (b, heads, 32, 32)
        matrix = self._projected(average)
        pixels = x.shape[2] * x.shape[3]
        rows = [self._attend(strip, matrix, pixels) for strip in strips]
        return torch.cat(rows, dim=1).permute(0, 3, 1, 2)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return two numbers of multiplications that ``derain bench`` adds, see `DerainModule.pass_once`.

        The first number counts the output projection minus ``to_qkv``: ``forward`` uses the weight of ``to_qkv`` in two
        parts, each of which ``derain bench`` has counted as the whole weight. The second number counts the matrix
        products of attention.
        """
        weight = cast(Tensor, self.to_out[0].weight)
        pixels = output.numel() // len(weight)
        plain = (weight.numel() - self.to_qkv.weight.numel()) * pixels
        return plain, 2 * pixels * weight.shape[1] * HEAD

    def _strips(self, x: Map) -> Sequence[Map]:
        """Cut a map into strips of rows, on a CPU without gradients; otherwise return the whole map as one strip."""
        if torch.is_grad_enabled() or compiling_or_exporting() or x.device.type != "cpu":
            return (x,)
        return torch.split(x, max(1, STRIP // (x.shape[0] * x.shape[3])), dim=2)

    def _projected(self, average: Float[Tensor, "b heads 32 32"]) -> Float[Tensor, "b i o"]:
        """Return the average values of each head multiplied by the head's part of the output projection."""
        weight = cast(Tensor, self.to_out[0].weight)
        with torch.autocast(average.device.type, enabled=False):
            head_weights = weight.view(-1, self.heads, HEAD).permute(1, 2, 0) * HEAD**-0.5
            matrices = cast(Tensor, average @ head_weights)
            return matrices.reshape(len(average), self.heads * HEAD, -1)

    def _attend(self, strip: Map, matrix: Float[Tensor, "b i o"], pixels: int | Tensor) -> Float[Tensor, "_ _ _ _"]:
        """Return the output for a strip of rows, ``(b, h, w, c)``; the map has ``pixels`` pixels."""
        batch, _, _, width = strip.shape
        queries = F.conv2d(strip, self.to_qkv.weight[: self.heads * HEAD]).permute(0, 2, 3, 1)
        queries = queries.reshape(batch, -1, self.heads, HEAD).softmax(3).flatten(2)
        bias = cast(Tensor, self.to_out[0].bias)
        y = torch.baddbmm(bias.to(queries.dtype), queries, matrix.to(queries.dtype), alpha=1 / cast(int, pixels))
        y = y.view(batch, -1, width, y.shape[2])
        return cast(Tensor, self.to_out[1](y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def _average(self, strip: Map) -> tuple[Float[Tensor, "b heads 32 32"], Float[Tensor, "b heads 32 1"]]:
        """Return the mean of a strip's values, weighted by exp(key), and the logarithm of the sum of the weights."""
        maps = F.conv2d(strip, self.to_qkv.weight[self.heads * HEAD :]).permute(0, 2, 3, 1)
        k, v = maps.reshape(len(strip), -1, 2, self.heads, HEAD).permute(2, 0, 3, 1, 4)  # (b, heads, pixels, 32)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        top = k.detach().amax(2, keepdim=True)
        k = (k - top).exp()
        total = k.sum(2)[..., None]
        with torch.autocast(strip.device.type, enabled=False):
            return k.transpose(2, 3) @ v.to(k.dtype) / total, total.log() + top.transpose(2, 3)


class Upsample(nn.ModuleList):
    """Nearest-neighbour upsampling by 2 and a 3×3 convolution, as one transposed convolution.

    The 3×3 kernel covers at most four different pixels of the input. The weights for the same pixel are summed first.

    Args:
        inputs: Input channels.
        outputs: Output channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__([nn.Identity(), nn.Conv2d(inputs, outputs, 3, padding=1)])

    def forward(self, x: Map) -> Map:
        """Upsample a map."""
        kernel = cast(Tensor, self[1].weight).transpose(0, 1)
        for _ in range(2):  # columns, then rows
            first, second, third = kernel.unbind(-1)
            kernel = torch.stack((third, second + third, first + second, first)).movedim(0, 2)
        return F.conv_transpose2d(x, kernel, cast(Tensor, self[1].bias), stride=2, padding=1)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return two numbers of multiplications that ``derain bench`` adds, see `DerainModule.pass_once`.

        The first number counts a 3×3 convolution at the size of the output. The second number, for attention, is 0.
        """
        weight = cast(Tensor, self[1].weight)
        return weight.numel() * (output.numel() // len(weight)), 0


class CrossAttention(nn.Module):
    """Multi-head attention of pixels to tokens, or to themselves.

    Args:
        channels: Channels of the pixels; a multiple of 32.
        context: Channels of the tokens.
    """

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b n c"], tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b k c"]:
        """Return the result of attention of ``n`` pixels to ``m`` tokens, for each pixel: ``k = n``.

        For a single token and without gradients, all pixels have the same result, which is returned once: ``k = 1``.
        """
        values = self.to_v(tokens)
        if tokens.shape[1] == 1 and not torch.is_grad_enabled():
            return cast(Tensor, self.to_out(values))
        q = _heads(self.to_q(x))
        k = _heads(self.to_k(tokens))
        v = _heads(values)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return cast(Tensor, self.to_out(attended))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return two numbers of multiplications that ``derain bench`` adds, see `DerainModule.pass_once`.

        The first number is 0. The second number counts the matrix products of attention.
        """
        x, tokens = inputs
        return 0, 2 * x.shape[1] * tokens.shape[1] * x.shape[2]


def _heads(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n 32"]:
    return cast(Tensor, x.unflatten(-1, (-1, HEAD)).transpose(1, 2))  # type: ignore[no-untyped-call]


class GatedFeedForward(nn.Module):
    """Feed-forward network of two linear layers with a GELU gate (GEGLU).

    Args:
        channels: Channels of the pixels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        project_in = nn.Sequential()
        project_in.add_module("proj", nn.Linear(channels, 8 * channels))
        self.net = nn.ModuleList([project_in, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Transform every pixel."""
        x, gate = self.net[0](x).chunk(2, dim=-1)
        return cast(Tensor, self.net[2](x * F.gelu(gate)))


class TransformerBlock(nn.Module):
    """Residual, pre-normalised self-attention, cross-attention to the content, and gated feed-forward network.

    Args:
        channels: Channels of the pixels.
        context: Size of the content embedding.
        self_attention: Whether pixels attend to each other.
    """

    def __init__(self, channels: int, context: int, self_attention: bool) -> None:
        super().__init__()
        if self_attention:
            self.attn1, self.norm1 = CrossAttention(channels, channels), nn.LayerNorm(channels)
        self.attn2, self.norm2 = CrossAttention(channels, context), nn.LayerNorm(channels)
        self.ff, self.norm3 = GatedFeedForward(channels), nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "b n c"], tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b n c"]:
        """Transform every pixel."""
        if hasattr(self, "attn1"):
            normalised = self.norm1(x)
            x = x + self.attn1(normalised, normalised)
        x = x + self.attn2(self.norm2(x), tokens)
        return cast(Tensor, x + self.ff(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """Residual transformer block over the pixels of a map, initialised to the identity.

    Args:
        channels: Channels of the map; a multiple of 32.
        context: Size of the content embedding.
        self_attention: Whether pixels attend to each other.
    """

    def __init__(self, channels: int, context: int, self_attention: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context, self_attention)])
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(cast(Tensor, self.proj_out.bias))

    def forward(self, x: Map, content: Embedding) -> Map:
        """Transform a map, given the content."""
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1)
        y = self.transformer_blocks[0](y.flatten(1, 2), content[:, None]).view(y.shape)
        return cast(Tensor, self.proj_out(y.permute(0, 3, 1, 2))) + x


class Attention(nn.Module):
    """Residual, pre-normalised attention, with the authors' parameter names ``fn.norm`` and ``fn.fn``.

    Args:
        channels: Channels of the map.
        attention: Attention module, called with a map and the content.
    """

    def __init__(self, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Module()
        self.fn.norm, self.fn.fn = ChannelNorm(channels), attention

    def forward(self, x: Map, content: Embedding | None) -> Map:
        """Transform a map."""
        inner = cast(Any, self.fn)
        return x + cast(Tensor, inner.fn(inner.norm(x), content))


class NoAttention(nn.Module):
    """Identity, called like `Attention`."""

    def forward(self, x: Map, content: Embedding | None) -> Map:
        """Return the map unchanged."""
        return x


class ConditionalUNet(nn.Module):
    """U-Net that estimates the noise in a state of the mean-reverting SDE, given the rainy image and the time.

    Args:
        channels: Channels at full resolution, an even number. With ``content``, the channels before and after the
            deepest level must be multiples of 32.
        multipliers: Channels after each level, as multiples of ``channels``; one per level.
        attention: Self-attention: ``none``, as in Pullabhotla's U-Net, or ``linear``: linear attention at every level
            and in the middle; with ``content``, ordinary attention instead at the deepest level and in the middle.
        content: Whether the deepest level and the middle have cross-attention to a content embedding.
        degradation: Whether a learned prompt, weighted by a function of a degradation embedding, is added to the time
            embedding.
        context: Size of the content and degradation embeddings.

    Raises:
        DerainError: If ``channels`` is odd, or the channels of the deepest level are not multiples of 32 as required.
    """

    def __init__(
        self,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        attention: AttentionKind = "linear",
        content: bool = True,
        degradation: bool = True,
        context: int = 512,
    ) -> None:
        super().__init__()
        widths = [channels, *(channels * factor for factor in multipliers)]
        if channels % 2 or (content and any(width % HEAD for width in widths[-2:])):
            raise DerainError(
                f"--model.channels {channels}: expected an even number and, with content, multiples of {HEAD} before "
                f"and after the deepest level (now {widths[-2:]}); change --model.channels or --model.multipliers"
            )
        self.depth = len(multipliers)
        time_size = 4 * channels
        self.init_conv = nn.Conv2d(6, channels, 7, padding=3, bias=False)
        features = TimeFeatures(channels)
        self.time_mlp = nn.Sequential(
            features, nn.Linear(channels, time_size), nn.GELU(), nn.Linear(time_size, time_size)
        )
        if degradation:
            self.prompt = nn.Parameter(torch.rand(1, time_size))
            self.text_mlp = nn.Sequential(nn.Linear(context, time_size), nn.SiLU(), nn.Linear(time_size, time_size))
            self.prompt_mlp = nn.Linear(time_size, time_size)

        def attention_module(width: int, deepest: bool) -> nn.Module:
            if content and deepest:
                return Attention(width, SpatialTransformer(width, context, attention == "linear"))
            if attention == "linear":
                return Attention(width, LinearAttention(width))
            return NoAttention()

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (fine, coarse) in enumerate(itertools.pairwise(widths)):
            deepest = level == self.depth - 1
            down = nn.Conv2d(fine, coarse, 4, stride=2, padding=1)
            if deepest:
                down = nn.Conv2d(fine, coarse, 3, padding=1, bias=False)
            plain = nn.Conv2d(coarse, fine, 3, padding=1, bias=False)
            up = Upsample(coarse, fine) if level > 0 else plain
            blocks = [ResBlock(fine, fine, time_size) for _ in range(2)]
            self.downs.append(nn.ModuleList([*blocks, attention_module(fine, deepest), down]))
            blocks = [ResBlock(coarse + fine, coarse, time_size) for _ in range(2)]
            self.ups.insert(0, nn.ModuleList([*blocks, attention_module(coarse, deepest), up]))
        self.mid_block1 = ResBlock(widths[-1], widths[-1], time_size)
        self.mid_attn = attention_module(widths[-1], True)
        self.mid_block2 = ResBlock(widths[-1], widths[-1], time_size)
        self.final_res_block = ResBlock(2 * channels, channels, time_size)
        self.final_conv = nn.Conv2d(channels, 3, 3, padding=1)

    def embed(self, times: Float[Tensor, " b"] | Int[Tensor, " b"], degradation: Embedding | None) -> Embedding:
        """Return the embedding of the time, ``(b, 4 * channels)``; with ``degradation``, the prompt is added to it."""
        time = self.time_mlp(times.to(self.init_conv.weight.dtype))
        if hasattr(self, "prompt"):
            weights = self.text_mlp(degradation).softmax(dim=1)
            time = time + self.prompt_mlp(weights * self.prompt)
        return cast(Tensor, time)

    def forward(
        self,
        state: Float[Tensor, "b 3 h w"],
        rainy: Float[Tensor, "b 3 h w"],
        times: Float[Tensor, " b"] | Int[Tensor, " b"],
        content: Embedding | None = None,
        degradation: Embedding | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the estimated noise in states.

        Args:
            state: States ``x(t)``, of any size.
            rainy: Rainy images ``μ`` in [0, 1].
            times: Times ``t``.
            content: Content embeddings ``(b, context)``, not normalised; required if the network has ``content``.
            degradation: Degradation embeddings ``(b, context)``, not normalised; required if the network has
                ``degradation``.
        """
        height, width = state.shape[2:]
        time = self.embed(times, degradation)
        x = pad_to_multiple(torch.cat((state - rainy, rainy), dim=1), 2**self.depth)
        stem = x = self.init_conv(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for first, second, attention, down in cast(Any, self.downs):
            x = first(x, time)
            skips.append(x)
            x = attention(second(x, time), content)
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, time), content), time)
        for first, second, attention, up in cast(Any, self.ups):
            x = first(torch.cat((x, skips.pop()), dim=1), time)
            x = second(torch.cat((x, skips.pop()), dim=1), time)
            x = up(attention(x, content))
        x = self.final_conv(self.final_res_block(torch.cat((x, stem), dim=1), time))
        return cast(Tensor, x[:, :, :height, :width])
