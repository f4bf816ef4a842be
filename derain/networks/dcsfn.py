"""DCSFN: encoder-decoders at three scales that exchange features by recurrent units.

Wang et al., DCSFN: Deep Cross-scale Fusion Network for Single Image Rain Removal, ACM MM 2020.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered
from derain.nn.conv_gru import ConvGRU
from derain.nn.inner_scale import DenseConnection, InnerScaleBlock, ScaleFusion, activate, resize
from derain.nn.padding import pad_to_minimum

SCALES = 3
"""Number of encoder-decoders, at scales 1, 1/2 and 1/4."""

MIN_SIDE = 32
"""Smallest height and width: a block at scale 1/4 pools its input by 8, to at least one pixel."""


class DCSFN(Network):
    """Deep cross-scale fusion network (6,422,547 parameters by default).

    Features of the image are max-pooled to scales 1, 1/2 and 1/4. Each scale has an encoder and a decoder of densely
    connected inner-scale blocks; a block of the decoder also reads the result of the encoder's block of the same index.
    Between encoders and decoders, two chains of convolutional GRUs run across the scales: from coarse to fine, then
    from fine to coarse. The state that a GRU reads comes from the outputs of the preceding GRUs of its chain, resized
    to its scale; the first GRU of a chain reads none.

    Sides below 32 pixels, for which the authors' code fails, are padded by repeating the border.

    The only output is ``derained``; the published loss is its negative SSIM.

    Args:
        channels: Number of channels of the features.
        blocks: Number of inner-scale blocks of each encoder and decoder.
        convolutions: Number of convolutions at each of the four scales of a block.

    References:
        DCSFN, section 3.
    """

    bgr: ClassVar[bool] = True
    bytes_per_pixel: int = 4352
    signature: ClassVar[str] = "encoder_scale4.units.0.fusion84.0.weight"
    published_names: ClassVar[Names] = (
        (r"fusion_[12]_2_2\..*", None),
        (r"rec(1_4|2_1)\.conv_(xr|h.)\..*", None),
        (r"^convert\.0\.", "head."),
        (r"^(en|de)coder_scale1\.", r"\1coders.0."),
        (r"^(en|de)coder_scale2\.", r"\1coders.1."),
        (r"^(en|de)coder_scale4\.", r"\1coders.2."),
        (r"\.units\.", ".blocks."),
        (r"\.conv1x1\.(\d+)\.0\.", r".transitions.\1."),
        (r"\.scale1\.(\d+)\.0\.", r".scales.0.\1."),
        (r"\.scale2\.(\d+)\.0\.", r".scales.1.\1."),
        (r"\.scale4\.(\d+)\.0\.", r".scales.2.\1."),
        (r"\.scale8\.(\d+)\.0\.", r".scales.3.\1."),
        (r"\.fusion21\.0\.", ".fusions.0.mix."),
        (r"\.fusion42\.0\.", ".fusions.1.mix."),
        (r"\.fusion84\.0\.", ".fusions.2.mix."),
        (r"\.fusion_all\.0\.", ".fusion.mix."),
        (r"^fusion_1_2_1\.0\.", "to_fine_state.mix."),
        (r"^fusion_2_2_1\.0\.", "to_coarse_state.mix."),
        (r"^rec1_1\.", "to_fine.0."),
        (r"^rec1_2\.", "to_fine.1."),
        (r"^rec1_4\.", "to_fine.2."),
        (r"^rec2_1\.", "to_coarse.0."),
        (r"^rec2_2\.", "to_coarse.1."),
        (r"^rec2_4\.", "to_coarse.2."),
        (r"\.conv_([xh])z\.", r".update_\1."),
        (r"\.conv_([xh])r\.", r".reset_\1."),
        (r"\.conv_([xh])n\.", r".candidate_\1."),
        (r"_x\.", "_input."),
        (r"_h\.", "_state."),
        (r"^merge\.0\.", "merge.mix."),
        (r"^merge\.2\.", "rain."),
    )

    def __init__(self, channels: int = 20, blocks: int = 16, convolutions: int = 4) -> None:
        super().__init__()

        def dense_blocks() -> DenseConnection:
            return DenseConnection((InnerScaleBlock(channels, convolutions) for _ in range(blocks)), channels)

        def grus(first: int) -> nn.ModuleList:
            """Return the GRUs of a chain that begins at the scale ``first``; 0 is the finest."""
            return nn.ModuleList(ConvGRU(channels, channels, recurrent=scale != first) for scale in range(SCALES))

        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.encoders = nn.ModuleList(dense_blocks() for _ in range(SCALES))
        self.to_fine, self.to_fine_state = grus(first=2), ScaleFusion(2 * channels, channels)
        self.to_coarse, self.to_coarse_state = grus(first=0), ScaleFusion(2 * channels, channels)
        self.decoders = nn.ModuleList(dense_blocks() for _ in range(SCALES))
        self.merge = ScaleFusion(SCALES * channels, 3)
        self.rain = nn.Conv2d(3, 3, 3, padding=1)

    def pad(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return images with sides of at least 32 pixels, padded by repeating the border."""
        return pad_to_minimum(image, MIN_SIDE)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``."""
        features = [activate(self.head(image.contiguous(memory_format=torch.channels_last)))]
        for _ in range(1, SCALES):
            features.append(F.max_pool2d(features[-1], 2))
        encoded, skips = [], []
        for encoder, x in zip(self.encoders, features, strict=True):
            x, results = encoder(x)
            encoded.append(x)
            skips.append(results)
        exchanged = self._exchange(encoded)
        decoded = [decoder(x, skip)[0] for decoder, x, skip in zip(self.decoders, exchanged, skips, strict=True)]
        return {"derained": image - self.rain(activate(self.merge(decoded)))}

    def _exchange(self, encoded: list[Tensor]) -> list[Tensor]:
        """Return the features of the three scales, finest first, after both chains of GRUs."""

        def update(gru: nn.Module, x: Tensor, state: Tensor | None) -> Tensor:
            return activate(cast(Tensor, gru(x, state)))

        full, half, quarter = encoded
        quarter = update(self.to_fine[2], quarter, None)
        half = update(self.to_fine[1], half, resize(quarter, half))
        full = update(self.to_fine[0], full, activate(self.to_fine_state([half, quarter], full)))
        full = update(self.to_coarse[0], full, None)
        half = update(self.to_coarse[1], half, resize(full, half))
        quarter = update(self.to_coarse[2], quarter, activate(self.to_coarse_state([full, half], quarter)))
        return [full, half, quarter]

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "channels": len(state[cls.signature]),
            "blocks": count_numbered(state, r"encoder_scale1\.units\.(\d+)\."),
            "convolutions": count_numbered(state, r"encoder_scale1\.units\.0\.scale1\.(\d+)\."),
        }
