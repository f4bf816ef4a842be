"""Multi-scale convolution blocks and dense connections of DCSFN and SSID-KD.

On a CPU, these narrow convolutions are faster if the input is in memory format ``torch.channels_last``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.nn.graphs import compiling_or_exporting

SLOPE = 0.2
"""Slope of LeakyReLU for negative values."""


def activate(x: Tensor) -> Tensor:
    """Apply LeakyReLU in place."""
    return F.leaky_relu_(x, SLOPE)


def resize(x: Float[Tensor, "b c h w"], like: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b c h2 w2"]:
    """Resize a map to the size of another by nearest-neighbour interpolation."""
    return F.interpolate(x, size=like.shape[2:])


class ScaleFusion(nn.Module):
    """Resize maps to one size by nearest-neighbour interpolation, concatenate them, and apply a 1×1 convolution.

    Each map is convolved before it is resized: the result is the same, and coarse maps have fewer pixels.

    Args:
        inputs: Total number of channels of the maps.
        outputs: Channels of the result.

    Shape:
        ``[(b, c_1, h_1, w_1), …]`` → ``(b, outputs, h, w)``; ``(h, w)`` is the size of ``like``.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(inputs, outputs, 1)

    def forward(self, maps: Sequence[Tensor], like: Tensor | None = None) -> Float[Tensor, "b c h w"]:
        """Fuse the maps, without activation.

        Args:
            maps: The maps.
            like: Map whose size the result has; by default the first of ``maps``.
        """
        like = maps[0] if like is None else like
        weights = torch.split(self.mix.weight, [x.shape[1] for x in maps], dim=1)
        fused: Tensor | None = None
        for x, weight in zip(maps, weights, strict=True):
            mixed = F.conv2d(x, weight, self.mix.bias if fused is None else None)
            if x is not like:
                mixed = resize(mixed, like)
            fused = mixed if fused is None else fused.add_(mixed)
        assert fused is not None
        return fused

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: a correction, and 0.

        ``derain bench`` counts the whole weight for each map, thop one convolution of all maps at the final size.
        """
        pixels = output.numel() // output.shape[1]
        counted = sum(x.numel() // x.shape[1] for x in inputs[0])
        return self.mix.weight.numel() * (pixels - counted), 0


class InnerScaleBlock(nn.Module):
    """Residual block of convolutions at several scales ("inner-scale connection block").

    The features are max-pooled to scales 1, 1/2, 1/4, …. From coarse to fine, the features of a scale are fused with
    the result of the coarser scale, then convolved. The results of all scales are fused and added to the input.

    Args:
        channels: Number of channels.
        convolutions: Number of 3×3 convolutions at each scale.
        scales: Number of scales.

    Shape:
        ``(b, channels, h, w)`` → same; ``h, w >= 2 ** (scales - 1)``.

    References:
        Wang et al., DCSFN, ACM MM 2020, "inner-scale connection block".
    """

    def __init__(self, channels: int, convolutions: int = 4, scales: int = 4) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convolutions))
            for _ in range(scales)
        )
        self.fusions = nn.ModuleList(ScaleFusion(2 * channels, channels) for _ in range(scales - 1))
        self.fusion = ScaleFusion(scales * channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply the block."""
        pooled = [x]
        for _ in self.fusions:
            pooled.append(F.max_pool2d(pooled[-1], 2))
        results: list[Tensor] = []
        for level in reversed(range(len(pooled))):
            features = pooled[level]
            if results:
                features = activate(self.fusions[level]([features, results[0]]))
            for convolution in self.scales[level].children():
                features = activate(convolution(features))
            results.insert(0, features)
        return x + activate(self.fusion(results))


class DenseConnection(nn.Module):
    """Densely connected blocks: each one reads a 1×1 convolution of the input and the results of all previous blocks.

    The first block reads the input itself. LeakyReLU follows each 1×1 convolution.

    Args:
        blocks: The blocks, whose results have the shape of their input.
        channels: Number of channels.
        repeats: How many times the sequence of blocks is applied. The blocks have the same weights each time; the 1×1
            convolutions do not.
        output: Whether a last 1×1 convolution reads the input and the results of all blocks.
    """

    def __init__(self, blocks: Iterable[nn.Module], channels: int, *, repeats: int = 1, output: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.repeats = repeats
        count = len(self.blocks) * repeats + int(output) - 1
        self.transitions = nn.ModuleList(nn.Conv2d((index + 2) * channels, channels, 1) for index in range(count))

    def forward(
        self, x: Float[Tensor, "b c h w"], skips: Sequence[Tensor] = ()
    ) -> tuple[Float[Tensor, "b c h w"], list[Tensor]]:
        """Apply the blocks.

        Args:
            x: The input.
            skips: Maps that are added to the inputs of the blocks, one for each application of a block, with the shape
                of ``x``; empty for none.

        Returns:
            The output of the last 1×1 convolution (of the last block if ``output`` is false), and the results of all
            blocks.
        """
        blocks = [*self.blocks] * self.repeats
        dense = _Concatenation(x, 1 + len(blocks))
        for index, block in enumerate(blocks):
            x = dense.append(block(x + skips[index] if skips else x))
            if index < len(self.transitions):
                x = activate(dense.convolve(self.transitions[index]))
        return x, dense.maps[1:]


class _Concatenation:
    """Growing concatenation of maps, read by 1×1 convolutions.

    With gradients, or when a graph is recorded, the maps are concatenated for each convolution. Otherwise, one tensor
    stores all maps, and a 1×1 convolution is a matrix product that needs no copy.

    Args:
        x: The first map.
        count: Number of maps after the last `append`.
    """

    def __init__(self, x: Float[Tensor, "b c h w"], count: int) -> None:
        self.maps: list[Tensor] = []
        self.pixels: Tensor | None = None
        if not (torch.is_grad_enabled() or compiling_or_exporting()):
            b, c, h, w = x.shape
            self.pixels = x.new_empty(b, h, w, count * c)
        self.append(x)

    def append(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Append a map; return the stored map, which may be a view of the common tensor."""
        if self.pixels is not None:
            start = len(self.maps) * x.shape[1]
            stored = self.pixels[..., start : start + x.shape[1]].permute(0, 3, 1, 2)
            x = stored.copy_(x)
        self.maps.append(x)
        return x

    def convolve(self, convolution: nn.Module) -> Float[Tensor, "b c h w"]:
        """Apply a 1×1 convolution to the concatenation of the maps so far."""
        if self.pixels is None:
            result: Tensor = convolution(torch.cat(self.maps, dim=1))
            return result
        weight, bias = convolution.parameters()
        b, h, w, c = self.pixels.shape
        product = torch.addmm(bias, self.pixels.view(b * h * w, c)[:, : weight.shape[1]], weight.flatten(1).t())
        return product.view(b, h, w, -1).permute(0, 3, 1, 2)
