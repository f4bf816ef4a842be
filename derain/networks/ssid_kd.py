"""SSID-KD's network: encoder-decoders at three scales; those at finer scales also read features of coarser scales.

Cui et al., Semi-Supervised Image Deraining Using Knowledge Distillation, IEEE TCSVT 2022.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered
from derain.nn.inner_scale import DenseConnection, InnerScaleBlock, activate
from derain.nn.padding import pad_to_minimum

MIN_SIDE = 32
"""Smallest height and width: a block at scale 1/4 pools its input by 8, to at least one pixel."""


class KernelFusionBlock(nn.Module):
    """Residual block of 3×3 and 5×5 convolutions that exchange their results ("multi-scale fusion block").

    Args:
        channels: Number of channels.

    Shape:
        ``(b, channels, h, w)`` → same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.small, self.large = (nn.Conv2d(channels, channels, size, padding=size // 2) for size in (3, 5))
        self.small_second, self.large_second = (
            nn.Conv2d(2 * channels, 2 * channels, size, padding=size // 2) for size in (3, 5)
        )
        self.mix = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply the block."""
        first = torch.cat((activate(self.small(x)), activate(self.large(x))), dim=1)
        second = torch.cat((activate(self.small_second(first)), activate(self.large_second(first))), dim=1)
        mixed: Tensor = self.mix(second)
        return mixed.add_(x)


class Results(NamedTuple):
    """Results of all applications of the blocks of an encoder-decoder: a list for each level, finest first.

    Attributes:
        encoded: Results in the encoders.
        decoded: Results in the decoders.
    """

    encoded: list[list[Tensor]]
    decoded: list[list[Tensor]]


class EncoderDecoder(nn.Module):
    """Encoder-decoder of densely connected blocks, with an encoder and a decoder at each level.

    Each level has half the size of the next finer one; the coarsest level has no decoder. An encoder or decoder applies
    the same block several times. All results of an encoder's block, concatenated and resized, are the input of the next
    encoder or decoder. So are those of a decoder's block, except that the last result is replaced by the sum of the
    decoder's output and the input of the encoder at its level.

    Encoders and decoders also read the results of the encoders and decoders at the same scale in the coarser
    encoder-decoder. At the finest level, which has no such counterpart, the decoder reads the results of the encoder.

    Args:
        channels: Number of channels of each level, finest first.
        repeats: How many times each encoder or decoder applies its block, by level.
        convolutions: Number of convolutions at each scale of an inner-scale block.
    """

    def __init__(self, channels: Sequence[int], repeats: Sequence[int], convolutions: int) -> None:
        super().__init__()

        def dense_blocks(level: int, *, output: bool = True) -> DenseConnection:
            width = channels[level]
            block = nn.Sequential(InnerScaleBlock(width, convolutions), KernelFusionBlock(width))
            return DenseConnection([block], width, repeats=repeats[level], output=output)

        def resample(source: int, target: int) -> nn.Conv2d:
            return nn.Conv2d(channels[source] * repeats[source], channels[target], 3, padding=1)

        levels = range(len(channels))
        self.encoders = nn.ModuleList(dense_blocks(level, output=len(levels) == 1) for level in levels)
        self.decoders = nn.ModuleList(dense_blocks(level) for level in levels[:-1])
        self.down = nn.ModuleList(resample(level, level + 1) for level in levels[:-1])
        self.up = nn.ModuleList(resample(level + 1, level) for level in levels[:-1])

    def forward(self, x: Float[Tensor, "b c h w"], coarser: Results | None) -> tuple[Tensor, Results]:
        """Encode and decode features.

        Args:
            x: Features of the finest level.
            coarser: Results of the encoder-decoder at the next coarser scale; None for the coarsest one.

        Returns:
            The decoded features, ``(b, c, h, w)``, and all results of the blocks.
        """
        inputs = [x]
        skips: list[list[Tensor]] = [[], *coarser.encoded] if coarser else [[]]
        x, results = self.encoders[0](x, skips[0])
        encoded = [results]
        for level, down in enumerate(self.down, 1):
            size = [side // 2 for side in results[0].shape[2:]]
            resized = [_resize(result, size) for result in results]
            inputs.append(activate(down(torch.cat(resized, dim=1))))
            x, results = self.encoders[level](inputs[-1], skips[level])
            encoded.append(results)
        skips = [encoded[0], *coarser.decoded] if coarser else []
        decoded: list[list[Tensor]] = []
        for level in reversed(range(len(self.up))):
            enlarged = _resize(torch.cat(results, dim=1), inputs[level].shape[2:])
            x, results = self.decoders[level](activate(self.up[level](enlarged)), skips[level])
            decoded.insert(0, results)
            results = [*results[:-1], x + inputs[level]]
        return x + inputs[0], Results(encoded, decoded)


class SSIDKD(Network):
    """Network of SSID-KD (4,403,195 parameters by default).

    Encoder-decoders of one, two and three levels process features of the image at scales 1/4, 1/2 and 1. Their blocks
    consist of an inner-scale block, as in DCSFN, and a block of 3×3 and 5×5 convolutions. A convolution with
    LeakyReLU estimates the rain from the features of all scales; the rain is subtracted from the image.

    Sides below 32 pixels, for which the authors' code fails, are padded by repeating the border.

    Outputs: ``derained``; ``rain``, the rainy minus the derained image; ``code`` ``(b, channels[2], h // 4, w // 4)``,
    the last result of the coarsest encoder in the finest encoder-decoder. The semi-supervised stage compares the
    distributions of ``code`` for synthetic and real rain. The published loss of the supervised stage is the negative
    SSIM of ``derained``.

    Args:
        channels: Number of channels at scales 1, 1/2 and 1/4.
        repeats: How many times each encoder and decoder applies its block, at scales 1, 1/2 and 1/4.
        convolutions: Number of convolutions at each scale of an inner-scale block.

    References:
        SSID-KD, section III.
    """

    bgr: ClassVar[bool] = True
    bytes_per_pixel: int = 6912
    signature: ClassVar[str] = "encoder_decoder_4.enLayer_4.units.0.unit.1.conv_5_2.weight"
    published_names: ClassVar[Names] = (
        (r"encoder_decoder_1\.enLayer_(1\.conv1x1\.9|2\.conv1x1\.3|4\.conv1x1\.1)\..*", None),
        (r"encoder_decoder_2\.enLayer_(2\.conv1x1\.3|4\.conv1x1\.1)\..*", None),
        (r"^head\.convLayer_1\.0\.", "heads.0."),
        (r"^head\.convLayer_2\.0\.", "heads.1."),
        (r"^head\.convLayer_4\.0\.", "heads.2."),
        (r"^encoder_decoder_1\.enLayer_1\.", "branches.0.encoders.0."),
        (r"^encoder_decoder_1\.enLayer_2\.", "branches.0.encoders.1."),
        (r"^encoder_decoder_1\.enLayer_4\.", "branches.0.encoders.2."),
        (r"^encoder_decoder_1\.deLayer_2\.", "branches.0.decoders.1."),
        (r"^encoder_decoder_1\.deLayer_1\.", "branches.0.decoders.0."),
        (r"^encoder_decoder_1\.catLayer_1\.0\.", "branches.0.down.0."),
        (r"^encoder_decoder_1\.catLayer_2\.0\.", "branches.0.down.1."),
        (r"^encoder_decoder_1\.catLayer_3\.0\.", "branches.0.up.1."),
        (r"^encoder_decoder_1\.catLayer_4\.0\.", "branches.0.up.0."),
        (r"^encoder_decoder_2\.enLayer_2\.", "branches.1.encoders.0."),
        (r"^encoder_decoder_2\.enLayer_4\.", "branches.1.encoders.1."),
        (r"^encoder_decoder_2\.deLayer_2\.", "branches.1.decoders.0."),
        (r"^encoder_decoder_2\.catLayer_2\.0\.", "branches.1.down.0."),
        (r"^encoder_decoder_2\.catLayer_3\.0\.", "branches.1.up.0."),
        (r"^encoder_decoder_4\.enLayer_4\.", "branches.2.encoders.0."),
        (r"\.conv1x1\.(\d+)\.0\.", r".transitions.\1."),
        (r"\.units\.\d+\.unit\.", ".blocks.0."),  # all indices refer to one block
        (r"\.scale1\.(\d+)\.0\.", r".scales.0.\1."),
        (r"\.scale2\.(\d+)\.0\.", r".scales.1.\1."),
        (r"\.scale4\.(\d+)\.0\.", r".scales.2.\1."),
        (r"\.scale8\.(\d+)\.0\.", r".scales.3.\1."),
        (r"\.fusion21\.0\.", ".fusions.0.mix."),
        (r"\.fusion42\.0\.", ".fusions.1.mix."),
        (r"\.fusion84\.0\.", ".fusions.2.mix."),
        (r"\.fusion_all\.0\.", ".fusion.mix."),
        (r"\.conv_3_1\.", ".small."),
        (r"\.conv_3_2\.", ".small_second."),
        (r"\.conv_5_1\.", ".large."),
        (r"\.conv_5_2\.", ".large_second."),
        (r"\.confusion\.", ".mix."),
        (r"^tail\.catLayer\.0\.", "rain."),
    )

    def __init__(
        self, channels: Sequence[int] = (24, 32, 48), repeats: Sequence[int] = (10, 4, 2), convolutions: int = 4
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(3, width, 3, padding=1) for width in channels)
        self.branches = nn.ModuleList(
            EncoderDecoder(channels[scale:], repeats[scale:], convolutions) for scale in range(len(channels))
        )
        self.rain = nn.Conv2d(sum(channels), 3, 3, padding=1)

    def pad(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return images with sides of at least 32 pixels, padded by repeating the border."""
        return pad_to_minimum(image, MIN_SIDE)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``, ``rain`` and ``code``."""
        image = image.contiguous(memory_format=torch.channels_last)
        size = image.shape[2:]
        features: list[Tensor] = []
        results: Results | None = None
        for scale in reversed(range(len(self.branches))):  # from scale 1/4 to scale 1
            resized = _resize(image, [side // 2**scale for side in size]) if scale else image
            x, results = self.branches[scale](activate(self.heads[scale](resized)), results)
            features.insert(0, _resize(x, size) if scale else x)
        rain = activate(self.rain(torch.cat(features, dim=1)))
        return {"derained": image - rain, "rain": rain, "code": cast(Results, results).encoded[-1][-1]}

    def targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the clean image for ``derained``, and rainy minus clean for ``rain``; ``code`` has no target."""
        return {"derained": clean, "rain": rainy - clean}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments but ``repeats``, which the authors do not vary; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "channels": [len(state[f"head.convLayer_{scale}.0.weight"]) for scale in (1, 2, 4)],
            "convolutions": count_numbered(state, r"encoder_decoder_4\.enLayer_4\.units\.0\.unit\.0\.scale1\.(\d+)\."),
        }


def _resize(x: Float[Tensor, "b c h w"], size: Sequence[Any]) -> Float[Tensor, "b c h2 w2"]:
    """Resize maps bilinearly."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
