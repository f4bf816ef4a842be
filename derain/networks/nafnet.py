"""NAFNet: a U-Net of blocks without activation functions; two halves of the channels multiply each other instead.

Chen et al., Simple Baselines for Image Restoration, ECCV 2022, as published by ClearView
(github.com/dronefreak/clearview). Computed as by the authors, except that

- tensors are ``(b, h, w, c)``, and without gradients, blocks process strips of rows;
- the factor of a residual multiplies the weights of the residual's last convolution, not the residual.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.networks.base import Names, Network, count_numbered
from derain.nn.graphs import compiling_or_exporting
from derain.nn.padding import pad_to_multiple, pad_with_zeros
from derain.nn.restormer import pointwise, spatial, strips


def gated(x: Float[Tensor, "b h w c2"], out: Float[Tensor, "b h w c"] | None = None) -> Float[Tensor, "b h w c"]:
    """Return the product of both halves of the channels ("SimpleGate"), written to ``out`` if given."""
    first, second = x.chunk(2, dim=-1)
    return torch.mul(first, second, out=out)


class NAFBlock(nn.Module):
    """Depth-wise convolution with channel attention, and feed-forward network; both gated, with residual connections.

    Args:
        channels: Number of channels.
        kernel_size: Side of the depth-wise kernels; odd.

    Shape:
        ``(b, h, w, channels)`` → same.

    References:
        NAFNet, Figures 3(d) and 4.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        wide, self.halo = 2 * channels, kernel_size // 2
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, kernel_size, padding=self.halo, groups=wide)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.factor1 = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.feed_in = nn.Conv2d(channels, 2 * channels, 1)
        self.feed_out = nn.Conv2d(channels, channels, 1)
        self.factor2 = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Transform features."""
        if torch.is_grad_enabled() or compiling_or_exporting():
            mixed = gated(self._spatially_mixed(x))
            return self._projected(x, mixed * self._channel_weights(mixed), self._projections())
        width = self.expand.out_channels
        mixed = torch.empty_like(x)
        for rows, strip, own_rows in strips(x, width, self.halo):
            gated(self._spatially_mixed(strip)[:, own_rows], out=mixed[:, rows])
        channel_weights, (project, feed_out) = self._channel_weights(mixed), self._projections()
        is_single = len(x) == 1
        if is_single:  # the channel weights multiply the weights of the convolution, not the map
            project = project[0] * channel_weights.permute(0, 3, 1, 2), project[1]
        for rows, _, _ in strips(x, width):
            strip = mixed[:, rows] if is_single else mixed[:, rows] * channel_weights
            self._projected(x[:, rows], strip, (project, feed_out), out=mixed[:, rows])
        return mixed

    def _spatially_mixed(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c2"]:
        return spatial(pointwise(self.norm1(x), self.expand.weight, self.expand.bias), self.depthwise)

    def _channel_weights(self, mixed: Float[Tensor, "b h w c"]) -> Float[Tensor, "b 1 1 c"]:
        return pointwise(mixed.mean((1, 2), keepdim=True), self.attention.weight, self.attention.bias)

    def _projections(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _scaled(self.project, self.factor1), _scaled(self.feed_out, self.factor2)

    def _projected(
        self,
        x: Float[Tensor, "b h w c"],
        mixed: Float[Tensor, "b h w c"],
        projections: Sequence[tuple[Tensor, Tensor]],
        out: Float[Tensor, "b h w c"] | None = None,
    ) -> Float[Tensor, "b h w c"]:
        project, feed_out = projections
        x = pointwise(mixed, *project).add_(x)
        hidden = gated(pointwise(self.norm2(x), self.feed_in.weight, self.feed_in.bias))
        return torch.add(x, pointwise(hidden, *feed_out), out=out)


def _scaled(convolution: nn.Conv2d, factor: Float[Tensor, "1 c 1 1"]) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution whose output is multiplied by a factor for each channel."""
    return convolution.weight * factor.transpose(0, 1), cast(Tensor, convolution.bias) * factor.flatten()


class Downsample(nn.Module):
    """Downsampling by a 2×2 convolution: half the resolution, twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 2, stride=2)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Downsample."""
        return cast(Tensor, self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Upsample(nn.Module):
    """Upsampling by a 1×1 convolution and pixel-shuffle: twice the resolution, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """Upsample."""
        return F.pixel_shuffle(self.conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)


class Refinement(nn.Module):
    """Correction of the derained image by 3×3 convolutions at full resolution.

    The last convolution is initialised with zeros: an untrained refinement changes nothing.

    Args:
        channels: Number of channels of the features; the convolutions have half as many.
        factor: Ratio of the height of the images to that of the features.
        layers: Number of 3×3 convolutions between the first and the last.
    """

    def __init__(self, channels: int, factor: int, layers: int) -> None:
        super().__init__()
        self.factor, half = factor, channels // 2
        self.up = nn.Conv2d(channels, half * factor**2, 1, bias=False)
        self.embedding = nn.Conv2d(6, half, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(layers))
        self.output = nn.Conv2d(half, 3, 3, padding=1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(cast(Tensor, self.output.bias))

    def forward(
        self,
        features: Float[Tensor, "b h w c"],
        rainy: Float[Tensor, "b 3 h2 w2"],
        derained: Float[Tensor, "b 3 h2 w2"],
    ) -> Float[Tensor, "b 3 h2 w2"]:
        """Return the corrected image."""
        images = torch.cat((rainy, derained), dim=1).contiguous(memory_format=torch.channels_last)
        x = self.embedding(images) + self._upsampled(features)
        for layer in self.layers:
            x = F.relu(layer(x), inplace=True)
        return derained + cast(Tensor, self.output(x))

    def _upsampled(self, features: Float[Tensor, "b h w i"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the features at full resolution: a 1×1 convolution, and a pixel-shuffle that keeps channels last."""
        x = pointwise(features, self.up.weight)
        b, h, w, _ = x.shape
        f = self.factor
        x = x.reshape(b, h, w, f, f, -1).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h * f, w * f, -1).permute(0, 3, 1, 2)


class NAFNet(Network):
    """NAFNet, with further options of derain.

    The only output is ``derained``.

    Args:
        width: Number of channels at the finest level; it doubles at each level.
        encoder_blocks: Number of blocks at each level of the encoder, finest first.
        middle_blocks: Number of blocks at the coarsest resolution.
        decoder_blocks: Number of blocks at each level of the decoder, finest first.
        kernel_size: Side of the depth-wise kernels; odd.
        unshuffle: Factor by which the finest level is smaller than the image: each pixel of the level is a square of
            the image ("pixel unshuffle"). The skip connection around the network stays at full resolution.
        refinement_layers: Number of 3×3 convolutions between the first and the last one of the `Refinement`; 0 for no
            refinement.

    Raises:
        DerainError: If encoder and decoder have no levels or differ in their number, ``kernel_size`` is even or below
            3, ``unshuffle`` is below 1, ``refinement_layers`` is negative, or ``width`` is below 2 with a refinement.

    References:
        NAFNet, Figures 2(c) and 3(d). By default ClearView's "nafnet", 14,344,483 parameters; its "nafnet-small" has
        ``width`` 16, and one block at each level and in the middle: 1,137,203 parameters. ``kernel_size``,
        ``unshuffle`` and ``refinement_layers`` are derain's own.
    """

    signature: ClassVar[str] = "encoders.0.0.sca.conv.weight"
    published_names: ClassVar[Names] = (
        (r"^intro\.", "embedding."),
        (r"^ending\.", "output."),
        (r"^middle_blks\.", "middle."),
        (r"^encoders\.", "encoder."),
        *((rf"^decoders\.{3 - level}\.", f"decoder.{level}.") for level in range(4)),
        (r"^downs\.(\d)\.", r"down.\1.conv."),
        *((rf"^ups\.{3 - level}\.0\.", f"up.{level}.conv.") for level in range(4)),
        (r"\.beta$", ".factor1"),
        (r"\.gamma$", ".factor2"),
        (r"\.conv1\.", ".expand."),
        (r"\.dwconv\.", ".depthwise."),
        (r"\.sca\.conv\.", ".attention."),
        (r"\.conv2\.", ".project."),
        (r"\.conv3\.", ".feed_in."),
        (r"\.conv4\.", ".feed_out."),
    )

    def __init__(
        self,
        width: int = 32,
        encoder_blocks: Sequence[int] = (2, 2, 4, 8),
        middle_blocks: int = 4,
        decoder_blocks: Sequence[int] = (2, 2, 2, 2),
        kernel_size: int = 3,
        unshuffle: int = 1,
        refinement_layers: int = 0,
    ) -> None:
        super().__init__()
        levels = len(encoder_blocks)
        if not levels or len(decoder_blocks) != levels:
            raise DerainError(
                f"encoder_blocks {list(encoder_blocks)}, decoder_blocks {list(decoder_blocks)}: "
                "expected a number per level, for as many levels in both"
            )
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise DerainError(f"kernel_size {kernel_size}: expected an odd number of at least 3")
        if unshuffle < 1:
            raise DerainError(f"unshuffle {unshuffle}: expected at least 1")
        if refinement_layers < 0 or (refinement_layers and width < 2):
            raise DerainError(
                f"refinement_layers {refinement_layers}, width {width}: expected at least 0 layers, and with layers a "
                "width of at least 2"
            )

        def blocks(level: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(NAFBlock(width * 2**level, kernel_size) for _ in range(count)))

        self.unshuffle, self.size_multiple = unshuffle, unshuffle * 2**levels
        refinement_bytes = 6 * width + 80 if refinement_layers else 0
        self.bytes_per_pixel = max(100, 47 * width // unshuffle**2, refinement_bytes)
        self.embedding = nn.Conv2d(3 * unshuffle**2, width, 3, padding=1)
        self.encoder = nn.ModuleList(blocks(level, count) for level, count in enumerate(encoder_blocks))
        self.down = nn.ModuleList(Downsample(width * 2**level) for level in range(levels))
        self.middle = blocks(levels, middle_blocks)
        self.up = nn.ModuleList(Upsample(2 * width * 2**level) for level in range(levels))
        self.decoder = nn.ModuleList(blocks(level, count) for level, count in enumerate(decoder_blocks))
        self.output = nn.Conv2d(width, 3 * unshuffle**2, 3, padding=1)
        self.refinement = Refinement(width, unshuffle, refinement_layers) if refinement_layers else None

    def pad(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return images padded at the bottom and the right to sizes that the levels can halve.

        If ``unshuffle`` is 1, the padding is zeros, as in ClearView's code. Else `pad_to_multiple` pads: zeros would
        darken squares at the border.
        """
        return (pad_with_zeros if self.unshuffle == 1 else pad_to_multiple)(image, self.size_multiple)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``."""
        x = F.pixel_unshuffle(image, self.unshuffle)
        x = spatial(x.permute(0, 2, 3, 1).contiguous(), self.embedding)
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](self.up[level](x) + skips.pop())
        change = F.pixel_shuffle(self.output(x.permute(0, 3, 1, 2)), self.unshuffle)
        derained = change + image
        return {"derained": derained if self.refinement is None else self.refinement(x, image, derained)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return ``width`` and the numbers of blocks; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "width": len(state["intro.weight"]),
            "encoder_blocks": [count_numbered(state, rf"encoders\.{level}\.(\d+)\.") for level in range(4)],
            "middle_blocks": count_numbered(state, r"middle_blks\.(\d+)\."),
            "decoder_blocks": [count_numbered(state, rf"decoders\.{3 - level}\.(\d+)\.") for level in range(4)],
        }
