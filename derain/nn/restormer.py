"""Restormer: four-level encoder-decoder of transformer blocks with channel attention and gated feed-forward networks.

Zamir et al., Restormer: Efficient Transformer for High-Resolution Image Restoration, CVPR 2022. Parameters of
`Restormer` have the names and shapes of the authors' checkpoints. The computation is optimised:

- Tensors are ``(b, h, w, c)``: normalisation and convolutions are faster if the channels of a pixel are contiguous.
- Without gradients, maps are processed in strips of rows, which saves memory and fits the cache of a CPU.
- Attention and its output projection both multiply the channels of a pixel by a matrix. The two matrices are
  multiplied first, so that values are read once. Products of queries and keys are divided by the norms, instead of
  queries and keys themselves.
- Except in exported graphs, the hidden channels of the feed-forward network are padded with zeros to a multiple of 16,
  which suits vector instructions. Padded channels stay zero.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.graphs import compiling_or_exporting, exporting, has_no_values
from derain.nn.padding import pad_to_multiple

STRIP_BYTES = {"cpu": 8 << 20, "gpu": 256 << 20}
"""Target size of a strip's widest map, in bytes: it fits the cache of a CPU, or is enough work for a GPU."""

Interact = Callable[[int, Float[Tensor, "b h w c"]], Float[Tensor, "b h w c"]]
"""Function of a level and its features that returns features of the same shape.

Level 0 is the finest. The parameter names of `Restormer`, which are the authors', count from 1.
"""


def pointwise(
    x: Float[Tensor, "b h w i"], weight: Float[Tensor, "o i 1 1"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "b h w o"]:
    """Apply a 1×1 convolution to channels-last features."""
    # A dilation does not change a 1×1 convolution, but lets PyTorch use oneDNN on one thread too (above 20,480 values).
    dilation = 2 if not compiling_or_exporting() and x.numel() > 20480 and _uses_onednn(x) else 1
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, dilation=dilation).permute(0, 2, 3, 1)


def _uses_onednn(x: Tensor) -> bool:
    """Return whether PyTorch computes dilated convolutions of a map with oneDNN."""
    is_float32 = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_float32 and has_onednn


def spatial(x: Float[Tensor, "b h w i"], convolution: nn.Module) -> Float[Tensor, "b h w o"]:
    """Apply a convolution module to channels-last features."""
    return cast(Tensor, convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def strips(x: Float[Tensor, "b h w c"], width: int, halo: int = 1) -> Iterator[tuple[slice, Tensor, slice]]:
    """Split a map into strips of rows, with neighbouring rows above and below for convolution kernels.

    Strips save memory, and on a CPU, the maps computed from a strip fit into the cache. With gradients, or when a graph
    is recorded, there is only one strip.

    Args:
        x: The map.
        width: Channels of the widest map computed from a strip.
        halo: Number of neighbouring rows above and below a strip, at least 1; fewer at the border of the map.

    Yields:
        Slice of the strip's rows in the map; the strip with its neighbouring rows; slice of its rows in the second.
    """
    if torch.is_grad_enabled() or compiling_or_exporting():
        yield slice(None), x, slice(None)
        return
    budget = STRIP_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
    rows = max(4 * halo, budget // (x.shape[0] * x.shape[2] * width * x.element_size()))
    for top in range(0, x.shape[1], rows):
        above = min(top, halo)
        yield slice(top, top + rows), x[:, top - above : top + rows + halo], slice(above, above + rows)


def _as_float32(x: Tensor) -> Tensor:
    """Convert to float32; float64 is unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _min_norm(dtype: torch.dtype) -> float:
    """Return the lower bound of norms: 1e-12, as in `torch.nn.functional.normalize`; 1e-4 in float16.

    Gradients of small norms grow with the inverse of the bound, and scaled gradients must not overflow in float16.
    """
    return 1e-4 if dtype == torch.float16 else 1e-12


class Attention(nn.Module):
    """Base class of self- and cross-attention between channels.

    Each head computes ``softmax(Q Kᵀ · temperature) V``. The rows of Q, K and V are channels; those of Q and K are
    normalised. Products of queries and keys are accumulated over strips in float32 or wider.

    Args:
        channels: Number of channels.
        heads: Number of heads; must divide ``channels``.
        bias: Whether the convolutions have biases.

    Raises:
        DerainError: If ``heads`` does not divide ``channels``.

    References:
        Restormer, eq. 1; CLIP-RPN, eq. 9, where the temperature is 1/α.
    """

    def __init__(self, channels: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        if channels % heads:
            raise DerainError(f"{heads} heads do not divide {channels} channels; change heads or dim")
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def attend(self, parts: Iterable[Sequence[Tensor]]) -> Float[Tensor, "b h w c"]:
        """Return attention followed by the output projection, ``(b, h, w, channels)``.

        Args:
            parts: For each strip of rows, its queries, keys and values, ``(b, rows, w, channels)`` each.
        """
        values, products, squared_norms = [], [], []
        for query, key, value in parts:
            # Copied without gradients, so that the memory of queries and keys is reused for the next strip
            values.append(value if torch.is_grad_enabled() or compiling_or_exporting() else value.contiguous())
            with torch.autocast(value.device.type, enabled=False):
                products.append(self._products(query, key))
                squared_norms.append(torch.stack([_as_float32(x).square().sum((1, 2)) for x in (query, key)]))
        with torch.autocast(value.device.type, enabled=False):
            min_norm = _min_norm(query.dtype)
            norms = torch.stack(squared_norms).sum(0).clamp_min(min_norm**2).sqrt()
            matrix = self._projected_attention(torch.stack(products).sum(0), norms)
        mixed = [self._weighted(value, matrix.to(value.dtype)) for value in values]
        return torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0]

    def _weighted(self, value: Float[Tensor, "b h w c"], matrix: Float[Tensor, "b c c"]) -> Float[Tensor, "b h w c"]:
        """Return the product of each pixel's values with the matrix, plus the bias."""
        bias = self.project_out.bias
        bias = None if bias is None else bias.to(value.dtype)
        if len(value) == 1 and not (compiling_or_exporting() or has_no_values(value)):  # a convolution is faster
            return pointwise(value, matrix[0].T[..., None, None], bias)
        pixels = value.flatten(1, 2)
        mixed = pixels @ matrix if bias is None else torch.baddbmm(bias, pixels, matrix)
        return mixed.reshape(value.shape)

    def normalize(self, scores: Float[Tensor, "b heads d d"]) -> Float[Tensor, "b heads d d"]:
        """Return the attention weights from scores; rows are query channels, columns key channels."""
        return scores.softmax(-1)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of the output projection, and those of attention."""
        weight = self.project_out.weight
        pixels = output.numel() // len(weight)
        projection_macs = weight.numel() * pixels
        return projection_macs, 2 * projection_macs // len(self.temperature)

    def _products(self, query: Tensor, key: Tensor) -> Float[Tensor, "b heads d d"]:
        """Return the products of query and key channels, summed over the pixels."""
        if query.dtype == torch.float16:  # the sums over the pixels could overflow
            query, key = query.float(), key.float()
        b, h, w, _ = query.shape
        q, k = (x.reshape(b, h * w, len(self.temperature), -1).permute(0, 2, 3, 1) for x in (query, key))
        return _as_float32(q @ k.transpose(2, 3))

    def _projected_attention(
        self, products: Float[Tensor, "b heads d d"], norms: Float[Tensor, "2 b c"]
    ) -> Float[Tensor, "b c c"]:
        """Return the matrix by which values are multiplied: attention of all heads, then the output projection."""
        b, heads, _, _ = products.shape
        c = norms.shape[2]
        query_norms, key_norms = norms.reshape(2, b, heads, -1)
        cosines = products / (query_norms[..., :, None] * key_norms[..., None, :])
        attention = self.normalize(cosines * self.temperature)
        projection = self.project_out.weight.reshape(c, heads, -1).transpose(0, 1)
        matrix: Tensor = (projection @ attention).transpose(2, 3).reshape(b, c, c)
        return matrix


class SelfAttention(Attention):
    """Self-attention between channels ("MDTA").

    Args:
        channels: Number of channels.
        heads: Number of heads; must divide ``channels``.
        bias: Whether the convolutions have biases.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        Restormer, section 3.1, eq. 1.
    """

    def __init__(self, channels: int, heads: int, bias: bool = False) -> None:
        super().__init__(channels, heads, bias)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Apply the attention."""

        def queries_keys_values() -> Iterator[Sequence[Tensor]]:
            for _, strip, own_rows in strips(x, self.qkv.out_channels):
                qkv = spatial(pointwise(strip, self.qkv.weight, self.qkv.bias), self.qkv_dwconv)
                yield qkv[:, own_rows].chunk(3, dim=-1)

        return self.attend(queries_keys_values())


class CrossAttention(Attention):
    """Cross-attention between the channels of two maps.

    Args:
        channels: Number of channels.
        heads: Number of heads; must divide ``channels``.

    Shape:
        Query, key and value, ``(b, h, w, channels)`` each → same.

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
        """Attend to ``value`` by the similarity of ``query`` and ``key``."""
        inputs = {"query": query, "key": key, "value": value}
        maps = [
            spatial(pointwise(x, self.get_parameter(f"{name}.weight")), self.get_submodule(f"{name}_dwconv"))
            for name, x in inputs.items()
        ]
        return self.attend([maps])


class GatedFeedForward(nn.Module):
    """Feed-forward network of two depth-wise branches, one of which gates the other ("GDFN").

    Args:
        channels: Number of channels.
        expansion: Hidden channels of a branch divided by ``channels``; their number is rounded down.
        bias: Whether the convolutions have biases.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        Restormer, section 3.2, eq. 2.
    """

    halo: ClassVar[int] = 1
    """Distance in rows of the farthest pixel that a result depends on."""

    def __init__(self, channels: int, expansion: float, bias: bool = False) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def kernels(self) -> tuple[Tensor, ...]:
        """Return the weights, then the biases, of the three convolutions for `forward`.

        Except in exported graphs, hidden channels are padded to a multiple of 16.
        """
        convolutions = (self.project_in, self.dwconv, self.project_out)
        weights = [convolution.weight for convolution in convolutions]
        biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
        if exporting():  # the graph would contain the padding
            return (*weights, *biases)
        padding = -self.project_out.in_channels % 16

        def padded(parameter: Tensor) -> Tensor:
            halves = parameter.reshape(2, -1, *parameter.shape[1:])
            return F.pad(halves, (0, 0) * (parameter.dim() - 1) + (0, padding)).flatten(0, 1)

        project_out = F.pad(weights[2], (0, 0, 0, 0, 0, padding))
        return (*map(padded, weights[:2]), project_out, *map(padded, biases[:2]), *biases[2:])

    def forward(self, x: Float[Tensor, "b h w c"], kernels: tuple[Tensor, ...]) -> Float[Tensor, "b h w c"]:
        """Apply the network to a map or strip; ``kernels`` is the result of the method `kernels`."""
        project_in, depthwise, project_out, *biases = kernels
        bias_in, bias_depthwise, bias_out = biases or (None, None, None)
        hidden = pointwise(x, project_in, bias_in).permute(0, 3, 1, 2)
        hidden = F.conv2d(hidden, depthwise, bias_depthwise, padding=1, groups=len(depthwise))
        gate, gated = hidden.permute(0, 2, 3, 1).chunk(2, dim=-1)
        activation = F.gelu(gate)
        product = activation * gated if torch.is_grad_enabled() else activation.mul_(gated)
        return pointwise(product, project_out, bias_out)


class Norm(nn.Module):
    """Layer normalisation over the channels, with the authors' parameter names.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Normalise."""
        return cast(Tensor, self.body(x))


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward network, each with pre-normalisation and a residual connection.

    Args:
        channels: Number of channels.
        heads: Number of heads of the attention.
        expansion: Second argument of ``feed_forward``: by default hidden channels of a branch divided by ``channels``.
        attention: Class of the attention; its arguments are ``channels`` and ``heads``.
        feed_forward: Class of the feed-forward network, with the interface of `GatedFeedForward`; its arguments are
            ``channels`` and ``expansion``.
        norm: Class of the normalisation; its argument is ``channels``.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        expansion: float,
        attention: Callable[[int, int], nn.Module] = SelfAttention,
        feed_forward: Callable[[int, float], Any] = GatedFeedForward,
        norm: Callable[[int], nn.Module] = Norm,
    ) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.attn = attention(channels, heads)
        self.norm2 = norm(channels)
        self.ffn = feed_forward(channels, expansion)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Apply the block."""
        x = x + self.attn(self.norm1(x))
        if torch.is_grad_enabled() or compiling_or_exporting():
            return cast(Tensor, x + self.ffn(self.norm2(x), self.ffn.kernels()))
        kernels = self.ffn.kernels()
        out = torch.empty_like(x)
        for rows, strip, own_rows in strips(x, len(kernels[0]), self.ffn.halo):
            transformed = self.ffn(self.norm2(strip), kernels)[:, own_rows]
            torch.add(x[:, rows], transformed, out=out[:, rows])
        return out


class Downsample(nn.Module):
    """Downsampling by 3×3 convolution and pixel-unshuffle.

    Shape:
        ``(b, h, w, channels)`` → ``(b, h / 2, w / 2, 2 channels)``; ``h`` and ``w`` are even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Downsample."""
        x = spatial(x, self.body[0])
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4).flatten(3)


class Upsample(nn.Module):
    """Upsampling by 3×3 convolution and pixel-shuffle.

    Shape:
        ``(b, h, w, channels)`` → ``(b, 2 h, 2 w, channels / 2)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Upsample."""
        x = spatial(x, self.body[0])
        b, h, w, c = x.shape
        return x.reshape(b, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


class PatchEmbedding(nn.Module):
    """Embedding of image pixels by a 3×3 convolution, with the authors' parameter names."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 3, padding=1, bias=bias)

    def forward(self, image: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b h w c"]:
        """Embed images."""
        return spatial(image, self.proj)


class Restormer(nn.Module):
    """Restormer: encoder of four levels, decoder of three, refinement at full resolution.

    Args:
        dim: Number of channels at the finest level; it doubles at each level.
        blocks: Number of transformer blocks at each of the four levels; the decoder has as many as the encoder.
        refinement: Number of refinement blocks, at full resolution after the decoder.
        heads: Number of attention heads at each of the four levels; must divide the channels of the level.
        expansion: Hidden channels of the feed-forward networks divided by their channels.
        block: Class of the transformer blocks, with the first three arguments of `TransformerBlock`.
        bias: Whether convolutions have biases, except those of blocks, downsampling and upsampling.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped; any ``h, w >= 1``. Images are padded to multiples of 8 by
        `pad_to_multiple`.

    Raises:
        DerainError: If ``blocks`` or ``heads`` does not have four numbers, or ``heads`` do not divide the channels.

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
        block: Callable[[int, int, float], nn.Module] = TransformerBlock,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or len(heads) != 4:
            raise DerainError(
                f"blocks {list(blocks)}, heads {list(heads)}: expected four numbers each; give one per level"
            )

        def level(channels: int, index: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(block(channels, heads[index], expansion) for _ in range(count)))

        self.patch_embed: nn.Module = PatchEmbedding(dim, bias)
        self.encoder_level1 = level(dim, 0, blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = level(2 * dim, 1, blocks[1])
        self.down2_3 = Downsample(2 * dim)
        self.encoder_level3 = level(4 * dim, 2, blocks[2])
        self.down3_4 = Downsample(4 * dim)
        self.latent = level(8 * dim, 3, blocks[3])
        self.up4_3 = Upsample(8 * dim)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=bias)
        self.decoder_level3 = level(4 * dim, 2, blocks[2])
        self.up3_2 = Upsample(4 * dim)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=bias)
        self.decoder_level2 = level(2 * dim, 1, blocks[1])
        self.up2_1 = Upsample(2 * dim)
        self.decoder_level1 = level(2 * dim, 0, blocks[0])
        self.refinement = level(2 * dim, 0, refinement)
        self.output = nn.Conv2d(2 * dim, 3, 3, padding=1, bias=bias)

    def forward(
        self, rainy: Float[Tensor, "b 3 h w"], interact: Interact = lambda level, features: features
    ) -> Float[Tensor, "b 3 h w"]:
        """Restore images.

        Args:
            rainy: Images in [0, 1].
            interact: Function that changes the features of levels 3, 2 and 1 before upsampling; level 0 is the finest.
        """
        height, width = rainy.shape[2:]
        padded = pad_to_multiple(rainy, 8).permute(0, 2, 3, 1).contiguous()
        full = self.encoder_level1(self.patch_embed(padded))
        half = self.encoder_level2(self.down1_2(full))
        quarter = self.encoder_level3(self.down2_3(half))
        x = interact(3, self.latent(self.down3_4(quarter)))
        x = spatial(torch.cat((self.up4_3(x), quarter), dim=-1), self.reduce_chan_level3)
        x = interact(2, self.decoder_level3(x))
        x = spatial(torch.cat((self.up3_2(x), half), dim=-1), self.reduce_chan_level2)
        x = interact(1, self.decoder_level2(x))
        x = torch.cat((self.up2_1(x), full), dim=-1)
        x = spatial(self.refinement(self.decoder_level1(x)), self.output) + padded
        return x[:, :height, :width].permute(0, 3, 1, 2)
