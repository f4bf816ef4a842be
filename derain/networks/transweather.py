"""TransWeather: a pyramid transformer whose decoder attends to learned queries of the weather.

Valanarasu et al., TransWeather: Transformer-based Restoration of Images Degraded by Adverse Weather Conditions, CVPR
2022. The input is scaled to [-1, 1]. The output, of a tanh, is not scaled: its target is an image in [0, 1].
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered
from derain.nn.normalization import LayerNorm
from derain.nn.padding import pad_to_minimum
from derain.nn.pyramid import EPSILON, Block, Embedding, Map, ReducedAttention, split_heads

MIN_SIDE = 48
"""Minimum side of images in pixels: sides of 2 pixels at 1/32 of the size, which the attention of a path halves."""


class QueryAttention(nn.Module):
    """Attention of learned weather queries to the pixels.

    The authors repeat each query for a run of pixels in row-major order, so that each pixel has a query. Here, the
    result of each query is computed once, and then copied to its pixels.

    Args:
        width: Number of channels.
        heads: Number of heads.
        queries: Number of queries.

    References:
        TransWeather, section 3.3.
    """

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Map) -> Map:
        """Return the result of each pixel's query, as a map of the shape of ``x``."""
        batch, height, width, _ = x.shape
        query = split_heads(self.query(self.queries), self.heads).expand(batch, -1, -1, -1)
        key, value = (split_heads(part, self.heads) for part in self.key_value(x).flatten(1, 2).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        results = self.project(attended).transpose(1, 2)
        return F.interpolate(results, size=height * width).transpose(1, 2).reshape(x.shape)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of projections, and those of attention.

        The authors compute a result for each pixel, not for each query. thop misses the matrix products of attention.
        """
        pixels = output.shape[1] * output.shape[2]
        saved_pixels = output.shape[0] * (pixels - self.queries.shape[1])
        return saved_pixels * self.project.weight.numel(), 2 * output.numel() * pixels


class Stage(nn.Module):
    """Stage of the encoder, or the decoder: embedding, which downsamples; transformer blocks; normalisation.

    Args:
        embedding: Patch embedding.
        blocks: Transformer blocks.
        width: Number of channels after the embedding.
    """

    def __init__(self, embedding: Embedding, blocks: Iterable[Block], width: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(width, EPSILON)

    def forward(self, x: Map) -> Map:
        """Transform features."""
        return cast(Tensor, self.norm(self.blocks(self.embedding(x))))


class IntraPatch(nn.Module):
    """Path parallel to a stage, for smaller patches; its output has the size of the next stage's map ("Intra-PT").

    Args:
        channels: Number of channels of the input.
        width: Number of channels of the output.
        heads: Number of attention heads.
        reduction: Factor by which the map of keys and values is downsampled.
        expansion: Hidden channels of the feed-forward network divided by ``width``.
        drop: Probability that training skips a residual branch of the block for an image.

    References:
        TransWeather, section 3.2.
    """

    def __init__(self, channels: int, width: int, heads: int, reduction: int, expansion: int, drop: float) -> None:
        super().__init__()
        self.embedding = Embedding(channels, width)
        self.block = Block(width, ReducedAttention(width, heads, reduction), expansion, drop)
        self.norm = LayerNorm(width, EPSILON)

    def forward(self, x: Map) -> Map:
        """Transform features."""
        return cast(Tensor, self.norm(self.block(self.embedding(x))))


class ResidualBlock(nn.Module):
    """Residual block of two convolutions, whose result is multiplied by 0.1 and added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        return cast(Tensor, x + 0.1 * self.conv2(F.relu(self.conv1(x), inplace=True)))


class Upsample(nn.ConvTranspose2d):
    """Transposed convolution that doubles the resolution.

    Args:
        channels: Number of channels of the input.
        out_channels: Number of channels of the output.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 4, 2, 1)

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of the transposed convolution in thop, and 0."""
        return self.weight.numel() * (output.numel() // output.shape[1]), 0


class Projection(nn.Module):
    """Upsampling by transposed convolutions, with skip connections from the encoder.

    The keys of ``up`` are the factors by which the results are smaller than the image; those of ``residual`` are the
    authors' numbers.

    Args:
        widths: Number of channels of the encoder's maps, finest first.
        last: Number of channels at half and at full resolution.

    Shape:
        The decoder's map and the encoder's four maps → ``(b, last[1], h, w)``.
    """

    def __init__(self, widths: Sequence[int], last: Sequence[int]) -> None:
        super().__init__()
        channels = [widths[3], *widths[::-1], *last]
        steps = zip(("32", "16", "8", "4", "2", "1"), channels, channels[1:], strict=False)
        self.up = nn.ModuleDict({name: Upsample(c, d) for name, c, d in steps})
        self.residual = nn.ModuleDict({name: ResidualBlock(c) for name, c in zip("4321", channels[2:6], strict=True)})

    def forward(self, x: Map, maps: Sequence[Map]) -> Float[Tensor, "b c h w"]:
        """Upsample ``x`` to full resolution, adding the encoder's maps."""
        first, second, third, fourth = (encoded.permute(0, 3, 1, 2) for encoded in maps)
        y = self.upsample("32", x.permute(0, 3, 1, 2), fourth) + fourth
        y = self.residual["4"](self.upsample("16", y, third)) + third
        y = self.residual["3"](self.upsample("8", y, second)) + second
        y = self.residual["2"](self.upsample("4", y, first)) + first
        y = self.residual["1"](self.up["2"](y))
        return cast(Tensor, self.up["1"](y))

    def upsample(
        self, scale: str, x: Float[Tensor, "b c h w"], like: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b d h2 w2"]:
        """Double the size; crop the last row or column where the encoder rounded an odd size up.

        Args:
            scale: Key of the transposed convolution.
            x: Features.
            like: Map of the encoder, which has the size of the result.
        """
        return cast(Tensor, self.up[scale](x).narrow(2, 0, like.shape[2]).narrow(3, 0, like.shape[3]))


class TransWeather(Network):
    """TransWeather: encoder with four stages, decoder with weather queries, convolutional projection.

    Args:
        widths: Number of channels of the four stages.
        depths: Number of blocks of the four stages.
        heads: Number of attention heads of the four stages; must divide ``widths``.
        reductions: Factors by which the maps of keys and values are downsampled in the four stages; a parallel path has
            the factor of its stage.
        expansion: Hidden channels of the encoder's feed-forward networks divided by their channels.
        intra_heads: Number of attention heads of the paths parallel to the first three stages.
        decoder_depth: Number of blocks of the decoder.
        decoder_heads: Number of attention heads of the decoder.
        decoder_expansion: Hidden channels of the decoder's feed-forward networks divided by their channels.
        queries: Number of weather queries of each decoder block.
        last: Number of channels at half and at full resolution.
        drop: Probability that training skips a residual branch of the last block for an image. It increases linearly
            from 0 in the first block, in the encoder and again in the decoder.

    Outputs:
        ``derained``: The restored image, in (-1, 1) by a tanh; valid pixel values are in [0, 1].

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same. Sides are padded to multiples of 16, and at least to 48.

    Raises:
        DerainError: If a list does not have the expected length, or heads do not divide the channels.

    References:
        TransWeather, Figure 2. 37,755,411 parameters by default.
    """

    size_multiple: int = 16
    bytes_per_pixel: int = 400
    signature: ClassVar[str] = "Tdec.block1.0.attn.task_query"
    published_options: ClassVar[frozenset[str]] = frozenset({"heads", "intra_heads", "decoder_heads"})
    published_names: ClassVar[Names] = (
        (r"Tenc\.mini_patch_embed4\..*", None),
        (r"convtail\.conv_output\..*", None),
        (r"^Tenc\.patch_embed(\d)\.", r"encoder.\1.embedding."),
        (r"^Tenc\.block(\d)\.", r"encoder.\1.blocks."),
        (r"^Tenc\.norm(\d)\.", r"encoder.\1.norm."),
        (r"^Tenc\.mini_patch_embed(\d)\.", r"intra.\1.embedding."),
        (r"^Tenc\.patch_block(\d)\.0\.", r"intra.\1.block."),
        (r"^Tenc\.pnorm(\d)\.", r"intra.\1.norm."),
        (r"^Tdec\.patch_embed1\.", "decoder.embedding."),
        (r"^Tdec\.block1\.", "decoder.blocks."),
        (r"^Tdec\.norm1\.", "decoder.norm."),
        (r"\.embedding\.proj\.", ".embedding.conv."),
        (r"\.attn\.task_query$", ".attention.queries"),
        (r"\.attn\.q\.", ".attention.query."),
        (r"\.attn\.kv\.", ".attention.key_value."),
        (r"\.attn\.proj\.", ".attention.project."),
        (r"\.attn\.sr\.", ".attention.reduce."),
        (r"\.attn\.norm\.", ".attention.norm."),
        (r"\.mlp\.fc1\.", ".feed_forward.project_in."),
        (r"\.mlp\.dwconv\.dwconv\.", ".feed_forward.depthwise."),
        (r"\.mlp\.fc2\.", ".feed_forward.project_out."),
        (r"^convtail\.convd(\d+)x\.conv2d\.", r"projection.up.\1."),
        (r"^convtail\.dense_(\d)\.0\.(conv\d)\.conv2d\.", r"projection.residual.\1.\2."),
        (r"^clean\.conv2d\.", "tail."),
    )

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 4, 4),
        reductions: Sequence[int] = (4, 2, 2, 1),
        expansion: int = 2,
        intra_heads: Sequence[int] = (1, 2, 2),
        decoder_depth: int = 3,
        decoder_heads: int = 8,
        decoder_expansion: int = 4,
        queries: int = 48,
        last: Sequence[int] = (16, 8),
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        expected = {"widths": 4, "depths": 4, "heads": 4, "reductions": 4, "intra_heads": 3, "last": 2}
        given = (widths, depths, heads, reductions, intra_heads, last)
        for (name, count), numbers in zip(expected.items(), given, strict=True):
            if len(numbers) != count:
                raise DerainError(f"{name} {list(numbers)}: expected {count} numbers")
        all_heads = (*heads, *intra_heads, decoder_heads)
        for head_count, width in zip(all_heads, (*widths, *widths[1:], widths[3]), strict=True):
            if head_count < 1 or width % head_count:
                raise DerainError(f"heads {head_count}: expected a divisor of {width}, the number of channels")
        rates = torch.linspace(0, drop, sum(depths)).tolist()
        self.encoder, self.intra = nn.ModuleDict(), nn.ModuleDict()
        for index, name in enumerate("1234"):
            width, reduction = widths[index], reductions[index]
            first_block = sum(depths[:index])
            blocks = (
                Block(width, ReducedAttention(width, heads[index], reduction), expansion, rate)
                for rate in rates[first_block : first_block + depths[index]]
            )
            embedding = Embedding(widths[index - 1], width) if index else Embedding(3, width, 7, 4)
            self.encoder[name] = Stage(embedding, blocks, width)
            if index < 3:
                self.intra[name] = IntraPatch(
                    width, widths[index + 1], intra_heads[index], reduction, expansion, rates[first_block]
                )
        width = widths[3]
        decoder_blocks = (
            Block(width, QueryAttention(width, decoder_heads, queries), decoder_expansion, rate)
            for rate in torch.linspace(0, drop, decoder_depth).tolist()
        )
        self.decoder = Stage(Embedding(width, width), decoder_blocks, width)
        self.projection = Projection(widths, last)
        self.tail = nn.Conv2d(last[1], 3, 3, padding=1)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``."""
        height, width = image.shape[2:]
        maps = self.encode(pad_to_minimum(2 * image - 1, MIN_SIDE).permute(0, 2, 3, 1))
        features = self.projection(self.decoder(maps[-1]), maps)
        return {"derained": torch.tanh(self.tail(features))[..., :height, :width]}

    def encode(self, image: Float[Tensor, "b h w 3"]) -> list[Map]:
        """Return the maps of the four stages, at 1/4, 1/8, 1/16 and 1/32 of the resolution."""
        maps, x, intra = [], image, None
        for name, module in self.encoder.items():
            stage = cast(Stage, module)
            x = stage.embedding(x)
            x = x if intra is None else x + intra
            intra = self.intra[name](x) if name in self.intra else None
            x = stage.norm(stage.blocks(x))
            maps.append(x)
        return maps

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``drop`` and the numbers of heads; None for another network."""
        if cls.signature not in state:
            return None

        def shape(name: str) -> list[int]:
            return list(state[name].shape)

        numbers = range(1, 5)
        reduction_names = (f"Tenc.block{number}.0.attn.sr.weight" for number in numbers)
        widths = [shape(f"Tenc.patch_embed{number}.proj.weight")[0] for number in numbers]
        hidden, width = shape("Tdec.block1.0.mlp.fc1.weight")
        return {
            "widths": widths,
            "depths": [count_numbered(state, rf"Tenc\.block{number}\.(\d+)\.") for number in numbers],
            "reductions": [shape(name)[2] if name in state else 1 for name in reduction_names],
            "expansion": shape("Tenc.block1.0.mlp.fc1.weight")[0] // widths[0],
            "decoder_depth": count_numbered(state, r"Tdec\.block1\.(\d+)\."),
            "decoder_expansion": hidden // width,
            "queries": shape(cls.signature)[1],
            "last": [shape(f"convtail.convd{scale}x.conv2d.weight")[1] for scale in (2, 1)],
        }
