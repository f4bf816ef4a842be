"""MPRNet: restoration in three stages, which process quarters, halves and the whole of an image.

Zamir et al., Multi-Stage Progressive Image Restoration, CVPR 2021. Differences from the authors' computation:

- The quarters, or halves, of an image are processed as a batch.
- 1×1 convolutions come before bilinear upsampling, not after it: the two commute, and there are fewer pixels.
- Some features are added before they are upsampled, not after it.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered

Features = Sequence[Tensor]
"""Features ``(b, c, h, w)`` of three levels, with the full, half and quarter resolution of the stage."""

BILINEAR = 11
"""Operations per interpolated value of bilinear interpolation, as the Python package thop counts them."""


def convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Return a convolution without bias that keeps height and width."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


def halved(x: Float[Tensor, "b c h w"], dim: int) -> Float[Tensor, "b2 c h2 w2"]:
    """Return the two halves of images along dimension ``dim`` as a batch: all first halves, then all second halves."""
    return x.reshape(*x.shape[:dim], 2, -1, *x.shape[dim + 1 :]).movedim(dim, 0).flatten(0, 1)


def joined(x: Float[Tensor, "b2 c h2 w2"], dim: int) -> Float[Tensor, "b c h w"]:
    """Return images from their halves along dimension ``dim``: the inverse of `halved`."""
    return x.reshape(2, -1, *x.shape[1:]).movedim(0, dim).flatten(dim, dim + 1)


def upsampled(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Return features at twice the resolution by bilinear interpolation."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def cost_of_upsampling_first(layers: Sequence[nn.Module], x: Float[Tensor, "b c h w"], doublings: int) -> int:
    """Return how many more operations thop counts if upsampling comes before the convolutions.

    Args:
        layers: 1×1 convolutions, applied to ``x`` one after another.
        x: Features before upsampling.
        doublings: Number of upsamplings by 2; one precedes each of the first ``doublings`` convolutions.
    """
    low_pixels = pixels = x.numel() // x.shape[1]
    operations = 0
    for index, layer in enumerate(layers):
        conv = cast(nn.Conv2d, layer)
        if index < doublings:
            pixels *= 4
            operations += BILINEAR * conv.in_channels * pixels
        operations += conv.weight.numel() * (pixels - low_pixels)
    return operations


class ChannelAttentionBlock(nn.Module):
    """Residual block of two 3×3 convolutions and channel attention ("CAB").

    Args:
        channels: Number of channels.
        reduction: Ratio of ``channels`` to the number of channels of the attention's hidden layer.

    Shape:
        ``(b, channels, h, w)`` → same.

    References:
        MPRNet, section 3.1.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, channels, 3)
        self.conv2 = convolution(channels, channels, 3)
        self.squeeze = convolution(channels, channels // reduction, 1)
        self.excite = convolution(channels // reduction, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], slope: Float[Tensor, "1"]) -> Float[Tensor, "b c h w"]:
        """Transform features; ``slope`` is the negative slope of the PReLU between the convolutions."""
        hidden = self.conv1(x)
        residual = self.conv2(F.prelu(hidden, slope.to(hidden.dtype)))
        weights = self.excite(F.relu(self.squeeze(residual.mean((2, 3), keepdim=True)))).sigmoid()
        if torch.is_grad_enabled():
            return cast(Tensor, residual * weights + x)
        return cast(Tensor, residual.mul_(weights).add_(x))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of PReLU and mean in thop, and 0."""
        return 2 * output.numel() + output.shape[0] * output.shape[1], 0


class Blocks(nn.ModuleList):
    """Sequence of channel attention blocks."""

    def __init__(self, count: int, channels: int, reduction: int) -> None:
        super().__init__(ChannelAttentionBlock(channels, reduction) for _ in range(count))

    def forward(self, x: Float[Tensor, "b c h w"], slope: Float[Tensor, "1"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        for block in self:
            x = block(x, slope)
        return x


class Embedding(nn.Module):
    """Embedding of images by a 3×3 convolution and a channel attention block."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.conv = convolution(3, channels, 3)
        self.block = ChannelAttentionBlock(channels, reduction)

    def forward(self, image: Float[Tensor, "b 3 h w"], slope: Float[Tensor, "1"]) -> Float[Tensor, "b c h w"]:
        """Embed images."""
        return cast(Tensor, self.block(self.conv(image), slope))


class Encoder(nn.Module):
    """Encoder with three levels of two blocks each.

    Args:
        widths: Number of channels of each level, finest first.
        reduction: Reduction of the channel attention, see `ChannelAttentionBlock`.
        fusing: Whether the features of the previous stage are added at each level ("CSFF").

    References:
        MPRNet, sections 3.1 and 3.2.
    """

    def __init__(self, widths: Sequence[int], reduction: int, fusing: bool) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Blocks(2, width, reduction) for width in widths)
        self.down = nn.ModuleList(convolution(fine, coarse, 1) for fine, coarse in pairwise(widths))
        if fusing:
            self.from_encoder = nn.ModuleList(convolution(width, width, 1) for width in widths)
            self.from_decoder = nn.ModuleList(convolution(width, width, 1) for width in widths)

    def forward(
        self, x: Float[Tensor, "b c h w"], slope: Float[Tensor, "1"], previous: tuple[Features, Features] | None = None
    ) -> list[Tensor]:
        """Return the features of each level, finest first.

        Args:
            x: Features at full resolution.
            slope: Negative slope of the PReLUs.
            previous: Features of the previous stage's encoder and decoder; required if ``fusing``, else None.
        """
        features: list[Tensor] = []
        for level, blocks in enumerate(self.levels):
            if level:  # the average of 2×2 pixels equals bilinear downsampling by 2
                x = self.down[level - 1](F.avg_pool2d(x, 2))
            x = blocks(x, slope)
            if previous is not None:
                encoded, decoded = previous
                x = x + self.from_encoder[level](encoded[level]) + self.from_decoder[level](decoded[level])
            features.append(x)
        return features

    def extra_macs(self, inputs: tuple[Any, ...], output: list[Tensor]) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of bilinear downsampling in thop, and 0."""
        return sum(BILINEAR * x.numel() // 4 for x in output[:-1]), 0


class Decoder(nn.Module):
    """Decoder with three levels of two blocks each, and a block in each skip connection.

    Args:
        widths: Number of channels of each level, finest first.
        reduction: Reduction of the channel attention, see `ChannelAttentionBlock`.

    References:
        MPRNet, section 3.1.
    """

    def __init__(self, widths: Sequence[int], reduction: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Blocks(2, width, reduction) for width in widths)
        self.skip = nn.ModuleList(ChannelAttentionBlock(width, reduction) for width in widths[:-1])
        self.up = nn.ModuleList(convolution(coarse, fine, 1) for fine, coarse in pairwise(widths))

    def forward(self, encoded: Features, slope: Float[Tensor, "1"]) -> list[Tensor]:
        """Return the features of each level, finest first.

        Args:
            encoded: Features from the encoder, finest first.
            slope: Negative slope of the PReLUs.
        """
        x = self.levels[-1](encoded[-1], slope)
        features = [x]
        for level in reversed(range(len(self.up))):
            x = upsampled(self.up[level](x)) + self.skip[level](encoded[level], slope)
            x = self.levels[level](x, slope)
            features.insert(0, x)
        return features

    def extra_macs(self, inputs: tuple[Any, ...], output: list[Tensor]) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those that upsampling first adds in thop, and 0."""
        return sum(cost_of_upsampling_first([conv], x, 1) for conv, x in zip(self.up, output[1:], strict=True)), 0


class SupervisedAttention(nn.Module):
    """Restored image of a stage, and features for the next stage, which the image gates ("SAM").

    Args:
        channels: Number of channels.

    References:
        MPRNet, section 3.3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = convolution(channels, channels, 1)
        self.image = convolution(channels, 3, 1)
        self.gate = convolution(3, channels, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"], rainy: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b 3 h w"]]:
        """Return the features for the next stage, and the restored image."""
        image = self.image(x) + rainy
        return self.features(x) * self.gate(image).sigmoid() + x, image


class OriginalResolution(nn.Module):
    """Subnetwork at full resolution that adds features of the previous stage ("ORSNet").

    It has a residual group of blocks ("ORB") for each level of the previous stage. The features of the level are added
    to the result of the group.

    Args:
        widths: Number of channels of each level of the previous stage, finest first.
        channels: Number of channels.
        blocks: Number of blocks in each group.
        reduction: Reduction of the channel attention, see `ChannelAttentionBlock`.

    References:
        MPRNet, sections 3.1 and 3.2.
    """

    def __init__(self, widths: Sequence[int], channels: int, blocks: int, reduction: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Blocks(blocks, channels, reduction) for _ in widths)
        self.convs = nn.ModuleList(convolution(channels, channels, 3) for _ in widths)

        def projections() -> nn.ModuleList:
            """Return 1×1 convolutions for each level: from its width, through those of finer levels, to `channels`."""
            levels = nn.ModuleList()
            for level in range(len(widths)):
                steps = pairwise([*reversed(widths[: level + 1]), channels])
                levels.append(nn.Sequential(*(convolution(inputs, outputs, 1) for inputs, outputs in steps)))
            return levels

        self.from_encoder = projections()
        self.from_decoder = projections()

    def forward(
        self, x: Float[Tensor, "b c h w"], encoded: Features, decoded: Features, slope: Float[Tensor, "1"]
    ) -> Float[Tensor, "b c h w"]:
        """Transform features.

        Args:
            x: Features at full resolution.
            encoded: Features of the previous stage's encoder.
            decoded: Features of the previous stage's decoder.
            slope: Negative slope of the PReLUs.
        """
        for level, (blocks, conv) in enumerate(zip(self.groups, self.convs, strict=True)):
            previous = self.from_encoder[level](encoded[level]) + self.from_decoder[level](decoded[level])
            for _ in range(level):
                previous = upsampled(previous)
            x = x + conv(blocks(x, slope)) + previous
        return x

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those that upsampling first adds in thop, and 0."""
        _, encoded, decoded, _ = inputs
        operations = 0
        for projections, features in ((self.from_encoder, encoded), (self.from_decoder, decoded)):
            for level, (projection, x) in enumerate(zip(projections, features, strict=True)):
                operations += cost_of_upsampling_first([*projection.children()], x, level)
        return operations, 0


_BLOCK = r"(?:feat\d\.1|level\d\.\d+|skip_attn\d|orb\d\.body\.\d+)"
"""Regular expression of the authors' names of channel attention blocks."""


def _names_of_level(level: int) -> Names:
    """Return the replacements for tensor names of a level, counted from 0; the authors count from 1."""
    number = level + 1
    return (
        (rf"(?:en|de)coder_level{number}\.", f"levels.{level}."),
        (rf"skip_attn{number}\.", f"skip.{level}."),
        (rf"(down|up)(?:{number}{number + 1}|{number + 1}{number})\.\1\.1\.", rf"\1.{level}."),
        (rf"csff_(enc|dec){number}\.", rf"from_\1oder.{level}."),
        (rf"orb{number}\.body\.(\d+)\.(?=conv|squeeze|excite)", rf"groups.{level}.\1."),
        (rf"orb{number}\.body\.\d+\.", f"convs.{level}."),
        (rf"up_(enc|dec){number}\.up\.1\.", rf"from_\1oder.{number}.0."),
        (rf"up_(enc|dec){number}\.(\d)\.up\.1\.", rf"from_\1oder.{number}.\2."),
        (rf"conv_(enc|dec){number}\.", rf"from_\1oder.{level}.{level}."),
    )


class MPRNet(Network):
    """Multi-stage progressive restoration network.

    Stage 1 encodes quarters of the image and decodes halves. Stage 2 encodes halves and decodes the whole image. Stage
    3 keeps the full resolution. All PReLUs share one slope.

    Outputs: ``derained``, ``stage2`` and ``stage1``, the images of the third, second and first stage.

    Args:
        width: Number of channels of the encoder-decoders at their finest level.
        growth: Number of channels that each coarser level adds.
        refinement_growth: Number of channels that stage 3 adds to ``width``.
        refinement_blocks: Number of blocks in each group of stage 3.
        reduction: Reduction of the channel attention, see `ChannelAttentionBlock`.

    References:
        MPRNet, section 3 and Figure 2. 3,637,249 parameters by default.
    """

    size_multiple: int = 8
    bytes_per_pixel: int = 3800
    signature: ClassVar[str] = "sam12.conv1.weight"
    published_names: ClassVar[Names] = (
        (rf"^.*{_BLOCK}\.body\.1\.weight$", "slope"),
        (rf"({_BLOCK})\.body\.0\.", r"\1.conv1."),
        (rf"({_BLOCK})\.body\.2\.", r"\1.conv2."),
        (r"\.CA\.conv_du\.0\.", ".squeeze."),
        (r"\.CA\.conv_du\.2\.", ".excite."),
        (r"^shallow_feat(\d)\.0\.", r"embedding\1.conv."),
        (r"^shallow_feat(\d)\.1\.", r"embedding\1.block."),
        (r"^stage(\d)_((?:en|de)coder)\.", r"\2\1."),
        (r"^stage3_orsnet\.", "refinement."),
        *(row for level in range(3) for row in _names_of_level(level)),
        (r"^sam12\.", "attention1."),
        (r"^sam23\.", "attention2."),
        (r"^(attention\d)\.conv1\.", r"\1.features."),
        (r"^(attention\d)\.conv2\.", r"\1.image."),
        (r"^(attention\d)\.conv3\.", r"\1.gate."),
        (r"^concat12\.", "merge2."),
        (r"^concat23\.", "merge3."),
        (r"^tail\.", "output."),
    )

    def __init__(
        self,
        width: int = 40,
        growth: int = 20,
        refinement_growth: int = 16,
        refinement_blocks: int = 8,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        widths = [width, width + growth, width + 2 * growth]
        channels = width + refinement_growth
        self.slope = nn.Parameter(torch.full((1,), 0.25))
        self.embedding1 = Embedding(width, reduction)
        self.embedding2 = Embedding(width, reduction)
        self.embedding3 = Embedding(width, reduction)
        self.encoder1 = Encoder(widths, reduction, fusing=False)
        self.encoder2 = Encoder(widths, reduction, fusing=True)
        self.decoder1 = Decoder(widths, reduction)
        self.decoder2 = Decoder(widths, reduction)
        self.attention1 = SupervisedAttention(width)
        self.attention2 = SupervisedAttention(width)
        self.merge2 = convolution(2 * width, width, 3)
        self.merge3 = convolution(2 * width, channels, 3)
        self.refinement = OriginalResolution(widths, channels, refinement_blocks, reduction)
        self.output = convolution(channels, 3, 3)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return the images of the three stages, last stage first."""
        slope, halves = self.slope, halved(image, 2)
        encoded = self.encoder1(self.embedding1(halved(halves, 3), slope), slope)
        encoded = [joined(features, 3) for features in encoded]
        decoded = self.decoder1(encoded, slope)
        attended, stage1 = self.attention1(decoded[0], halves)
        x = self.merge2(torch.cat((self.embedding2(halves, slope), attended), dim=1))
        encoded = self.encoder2(x, slope, (encoded, decoded))
        encoded = [joined(features, 2) for features in encoded]
        decoded = self.decoder2(encoded, slope)
        attended, stage2 = self.attention2(decoded[0], image)
        x = self.merge3(torch.cat((self.embedding3(image, slope), attended), dim=1))
        derained = self.output(self.refinement(x, encoded, decoded, slope)) + image
        return {"derained": derained, "stage2": stage2, "stage1": joined(stage1, 2)}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network, or if no ``reduction`` up to 1024 fits."""
        if cls.signature not in state:
            return None
        widths = [len(state[f"stage1_encoder.encoder_level{level}.0.body.0.weight"]) for level in (1, 2, 3)]
        hidden = [len(state[f"stage1_encoder.encoder_level{level}.0.CA.conv_du.0.weight"]) for level in (1, 2, 3)]
        candidates = range(1, min(widths[0], 1024) + 1)
        reductions = [number for number in candidates if [width // number for width in widths] == hidden]
        if not reductions:
            return None
        return {
            "width": widths[0],
            "growth": widths[1] - widths[0],
            "refinement_growth": len(state["concat23.weight"]) - widths[0],
            "refinement_blocks": count_numbered(state, r"stage3_orsnet\.orb1\.body\.(\d+)\.CA"),
            "reduction": reductions[0],
        }
