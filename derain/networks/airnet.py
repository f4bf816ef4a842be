"""AirNet: deformable convolutions guided by features of the degradation.

Li et al., All-In-One Image Restoration for Unknown Corruption, CVPR 2022.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered
from derain.nn.deformable import deformable_convolution
from derain.nn.graphs import compiling_or_exporting, has_no_values

SLOPE = 0.1
"""Slope of the leaky ReLUs."""


class EncoderBlock(nn.Module):
    """Residual block with batch normalisation.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Transform features."""
        return F.leaky_relu(self.body(x) + self.shortcut(x), SLOPE)


class DegradationEncoder(nn.Module):
    """Encoder of the degradation ("CBDE").

    The first block, ``features``, computes the features that guide the restoration. All layers together compute an
    embedding of the image, which is needed only in training.

    Args:
        channels: Number of channels of the features.

    Attributes:
        width: Length of an embedding: four times ``channels``.

    References:
        AirNet, section 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.width = 4 * channels
        self.features = EncoderBlock(3, channels)
        self.blocks = nn.Sequential(
            EncoderBlock(channels, 2 * channels, 2), EncoderBlock(2 * channels, 4 * channels, 2)
        )
        self.head = nn.Sequential(
            nn.Linear(self.width, self.width), nn.LeakyReLU(SLOPE), nn.Linear(self.width, self.width)
        )

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Return an embedding for each image; not normalised."""
        return self.embed(self.features(image))

    def embed(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e"]:
        """Return an embedding for each map of features; not normalised."""
        return cast(Tensor, self.head(self.blocks(features).mean((2, 3))))


class Guidance(nn.Module):
    """Deformable convolution, scale and shift, all guided by features of the degradation ("DGM").

    Before training, all offsets are 0 and all masks 1/2.

    Args:
        channels: Number of channels of the input and of the guide.

    References:
        AirNet, section 3.3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Conv2d(channels, channels, 3).weight.detach())
        self.offset_and_mask = nn.Conv2d(2 * channels, 27, 3, padding=1)
        nn.init.zeros_(self.offset_and_mask.weight)
        nn.init.zeros_(cast(Tensor, self.offset_and_mask.bias))
        self.scale, self.shift = (
            nn.Sequential(
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.LeakyReLU(SLOPE, inplace=True),
                nn.Conv2d(channels, channels, 1, bias=False),
            )
            for _ in range(2)
        )

    def forward(self, x: Float[Tensor, "b c h w"], guide: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return ``x + deformed(x) + scale x + shift``.

        Args:
            x: Features of the image.
            guide: Features of the degradation.
        """
        offset, mask = self.offset_and_mask(torch.cat((x, guide), dim=1)).split((18, 9), dim=1)
        deformed = deformable_convolution(x, offset, mask.sigmoid(), self.weight)
        return x + deformed + torch.addcmul(self.shift(guide), x, self.scale(guide))

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: minus and plus those of the deformable convolution.

        ``derain bench`` counts them as those of a convolution; thop misses them.
        """
        macs = self.weight.numel() * (output.numel() // output.shape[1])
        return -macs, macs


class Block(nn.Module):
    """Two guided deformable convolutions, each followed by a convolution, with a residual connection ("DGB").

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.guidance1, self.guidance2 = Guidance(channels), Guidance(channels)
        self.convolution1, self.convolution2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Float[Tensor, "b c h w"], guide: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        y = self.convolution1(F.leaky_relu(self.guidance1(x, guide), SLOPE))
        y = F.leaky_relu(self.guidance2(F.leaky_relu(y, SLOPE), guide), SLOPE)
        return cast(Tensor, self.convolution2(y) + x)


class Group(nn.Module):
    """Blocks and a convolution, with a residual connection ("DGG").

    Args:
        channels: Number of channels.
        blocks: Number of blocks.
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], guide: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform features."""
        y = x
        for block in self.blocks:
            y = block(y, guide)
        return cast(Tensor, self.convolution(y) + x)


class AirNet(Network):
    """AirNet: groups of blocks, guided by an encoder of the degradation.

    Outputs: ``derained``, and in training mode ``embedding`` ``(b, 4 * channels)`` for the contrastive loss of
    `derain.methods.airnet`.

    Args:
        channels: Number of channels.
        groups: Number of groups.
        blocks: Number of blocks in each group.

    References:
        AirNet, section 3 and Figures 2 and 3. 7,610,377 parameters by default, of which the encoder has 1,319,936.
        The authors' file also has a second encoder, which is used only in training.
    """

    bytes_per_pixel: int = 4300
    signature: ClassVar[str] = "R.body.0.body.0.dgm1.dcn.weight"
    published_names: ClassVar[Names] = (
        (r"E\.E\.(encoder_k\..*|queue|queue_ptr)", None),
        (r"^E\.E\.encoder_q\.E_pre\.", "encoder.features."),
        (r"^E\.E\.encoder_q\.E\.", "encoder.blocks."),
        (r"^E\.E\.encoder_q\.mlp\.", "encoder.head."),
        (r"^(encoder\..*)\.backbone\.", r"\1.body."),
        (r"^R\.(head|tail)\.0\.", r"\1."),
        (r"^R\.body\.\d+\.(weight|bias)$", r"convolution.\1"),
        (r"^R\.body\.(\d+)\.body\.\d+\.(weight|bias)$", r"groups.\1.convolution.\2"),
        (r"^R\.body\.(\d+)\.body\.(\d+)\.", r"groups.\1.blocks.\2."),
        (r"\.conv(\d)\.", r".convolution\1."),
        (r"\.dgm(\d)\.", r".guidance\1."),
        (r"\.dcn\.weight$", ".weight"),
        (r"\.dcn\.conv_offset_mask\.", ".offset_and_mask."),
        (r"\.sft\.conv_gamma\.", ".scale."),
        (r"\.sft\.conv_beta\.", ".shift."),
    )

    def __init__(self, channels: int = 64, groups: int = 5, blocks: int = 5) -> None:
        super().__init__()
        self.encoder = DegradationEncoder(channels)
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.groups = nn.ModuleList(Group(channels, blocks) for _ in range(groups))
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained``; in training mode, and when ``derain bench`` counts MACs, also ``embedding``."""
        guide = self.encoder.features(image)
        head = x = self.head(image)
        for group in self.groups:
            x = group(x, guide)
        outputs = {"derained": self.tail(self.convolution(x) + head)}
        counting = has_no_values(image) and not compiling_or_exporting()  # the authors always compute the embedding
        if self.training or counting:
            outputs["embedding"] = self.encoder.embed(guide)
        return outputs

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network."""
        if cls.signature not in state:
            return None
        return {
            "channels": state["R.head.0.weight"].shape[0],
            "groups": count_numbered(state, r"R\.body\.(\d+)\.body\."),
            "blocks": count_numbered(state, r"R\.body\.0\.body\.(\d+)\.dgm1\."),
        }
