"""Syn2Real: U-Net of Res2Net blocks.

Yasarla et al., Syn2Real Transfer Learning for Image Deraining using Gaussian Processes, CVPR 2020. The authors'
code calls the network DeRain_v2. `derain.methods.syn2real` adds the Gaussian process, which supervises the features of
unlabelled images.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.networks.base import Names, Network, count_numbered

SLOPE = 0.2
"""Negative slope of the LeakyReLUs."""

STAGES = (
    *(f"encoder.{level}" for level in range(3)),
    *(f"bottom.{index}" for index in range(3)),
    *(f"decoder.{index}" for index in range(3)),
)
"""derain's names for the authors' blocks 1 to 9."""


class DenseBlock(nn.Module):
    """Res2Net block of grouped convolutions, whose input and output are concatenated.

    A 1×1 convolution widens the features, which are then split into parts. Each part but the last is convolved, after
    the result of the previous part is added. A 1×1 convolution joins all parts. The output is the input, concatenated
    with the sum of the input and the joined parts.

    Args:
        channels: Number of channels of the input.
        width: Number of channels of a part.
        parts: Number of parts.
        groups: Number of groups of the 3×3 convolutions.

    Shape:
        ``(b, channels, h, w)`` → ``(b, 2 * channels, h, w)``.

    References:
        "Res2Block" of Syn2Real, after Gao et al., Res2Net, TPAMI 2021, eq. 1.
    """

    def __init__(self, channels: int, width: int, parts: int, groups: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, width * parts, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(parts - 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False) for _ in range(parts - 1)
        )
        self.last_norm = nn.BatchNorm2d(width * parts)
        self.project = nn.Conv2d(width * parts, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Return the input and the transformed features, concatenated."""
        hidden = self.convolve_parts(self.expand(_normalize_and_activate(self.first_norm, x)))
        return torch.cat((x, self.project(_normalize_and_activate(self.last_norm, hidden)) + x), dim=1)

    def convolve_parts(self, hidden: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        """Convolve each part but the last, after adding the result of the previous part."""
        *parts, last = hidden.chunk(len(self.convs) + 1, dim=1)
        results: list[Tensor] = []
        for part, norm, conv in zip(parts, self.norms, self.convs, strict=True):
            x = results[-1] + part if results else part
            results.append(conv(_normalize_and_activate(norm, x)))
        return torch.cat((*results, last), dim=1)


class Transition(nn.Module):
    """Normalisation, ReLU, 1×1 convolution, and a change of size.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        resize: ``down`` averages squares of 2×2 pixels, ``up`` doubles each pixel along both axes, ``none`` keeps the
            size.

    Shape:
        ``(b, inputs, h, w)`` → ``(b, outputs, h', w')``.
    """

    def __init__(self, inputs: int, outputs: int, resize: Literal["none", "down", "up"] = "none") -> None:
        super().__init__()
        self.resize = resize
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.ConvTranspose2d(inputs, outputs, 1, bias=False)  # transposed like the authors' weights

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        """Transform features."""
        x = _normalize_and_activate(self.norm, x)
        if self.resize == "down":
            x = F.avg_pool2d(x, 2)  # the authors average after the convolution, with the same result at a higher cost
        x = self.conv(x)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resize == "up" else x


class Stage(nn.Module):
    """Block between two transitions.

    Args:
        entry: First transition, which changes the size; None for no transition.
        block: The block.
        exit: Last transition, which keeps the size; None for no transition.

    Shape:
        ``(b, c, h, w)`` and maps of skip connections ``(b, d, h', w')``, if any → ``(b, c', h', w')``.
    """

    def __init__(self, entry: Transition | None, block: DenseBlock, exit: Transition | None) -> None:
        super().__init__()
        self.entry = entry or nn.Identity()
        self.block = block
        self.exit = exit or nn.Identity()

    def forward(self, x: Float[Tensor, "b i h w"], *skipped: Float[Tensor, "b _ h2 w2"]) -> Float[Tensor, "b o h2 w2"]:
        """Transform features; ``skipped`` maps are concatenated with the features after the first transition."""
        x = self.entry(x)
        return cast(Tensor, self.exit(self.block(torch.cat((x, *skipped), dim=1) if skipped else x)))


def _normalize_and_activate(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply batch normalisation and ReLU."""
    return F.relu(norm(x), inplace=True)


class Syn2Real(Network):
    """Syn2Real: encoder and decoder with three scales each, and three blocks at 1/8 of the size between them.

    Args:
        channels: Number of channels at full size; the other widths are multiples of it.
        base_width: Channels per convolution group of a block with 64 channels. Blocks with c channels have
            ``max(1, c * base_width // 64)``.
        groups: Number of groups of the 3×3 convolutions.
        parts: Number of parts of a block.

    Outputs:
        ``derained``: The restored image, in (0, 1) by a sigmoid.
        ``features``: Latent features of the padded image, ``(b, 2 * channels, h / 8, w / 8)``. The paper calls them z,
            and compares them by a Gaussian process; a supervised loss does not use them.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same.

    References:
        Syn2Real, "DeRain_v2". 2,605,710 parameters by default. The authors' network has 12,584 more, in layers for
        squeeze-and-excitation that it does not apply.
    """

    size_multiple: int = 8
    bytes_per_pixel: int = 13824
    signature: ClassVar[str] = "zout.weight"
    published_names: ClassVar[Names] = (
        (r"dense_block\d\.SE\..*", None),
        *((rf"^dense_block{number}\.", f"{stage}.block.") for number, stage in enumerate(STAGES, 1)),
        *((rf"^trans_block{number}\.", f"{stage}.entry.") for number, stage in enumerate(STAGES, 1)),
        *((rf"^trans_block{number}_o\.", f"{stage}.exit.") for number, stage in enumerate(STAGES, 1)),
        (r"\.block\.bn1\.", ".block.first_norm."),
        (r"\.block\.conv1\.", ".block.expand."),
        (r"\.block\.bns\.", ".block.norms."),
        (r"\.block\.bn3\.", ".block.last_norm."),
        (r"\.block\.conv3\.", ".block.project."),
        (r"\.bn1\.", ".norm."),
        (r"\.conv1\.", ".conv."),
        (r"^conv_input\.", "head."),
        (r"^zout\.", "latent."),
        (r"^conv_refin\.", "rain."),
        (r"^refine3\.", "image."),
        (r"^refineclean1\.", "refinement."),
        (r"^refineclean2\.", "tail."),
    )

    def __init__(self, channels: int = 16, base_width: int = 12, groups: int = 8, parts: int = 6) -> None:
        super().__init__()

        def block(channels: int) -> DenseBlock:
            return DenseBlock(channels, max(1, channels * base_width // 64) * groups, parts, groups)

        c = channels
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.encoder = nn.ModuleList(
            [
                Stage(None, block(c), None),
                Stage(Transition(2 * c, 2 * c, "down"), block(2 * c), Transition(4 * c, 2 * c)),
                Stage(Transition(2 * c, 2 * c, "down"), block(2 * c), Transition(4 * c, 4 * c)),
            ]
        )
        self.bottom = nn.Sequential(
            Stage(Transition(4 * c, 8 * c, "down"), block(8 * c), Transition(16 * c, 8 * c)),
            *(Stage(None, block(8 * c), Transition(16 * c, 8 * c)) for _ in range(2)),
        )
        self.latent = nn.Conv2d(8 * c, 2 * c, 3, padding=1)
        self.decoder = nn.ModuleList(
            [
                Stage(Transition(2 * c, 4 * c, "up"), block(8 * c), Transition(16 * c, 2 * c)),
                Stage(Transition(2 * c, 2 * c, "up"), block(4 * c), Transition(8 * c, 2 * c)),
                Stage(Transition(2 * c, 2 * c, "up"), block(5 * c), Transition(10 * c, c)),
            ]
        )
        self.rain = nn.Conv2d(c, c, 3, padding=1)
        self.image = nn.Conv2d(c, 3, 3, padding=1)
        self.refinement = nn.Conv2d(3, 8, 7, padding=3)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def restore(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Return ``derained`` and ``features``."""
        shallow = self.head(2 * image - 1)
        finest = self.encoder[0](shallow)
        middle = self.encoder[1](finest)
        coarse = self.encoder[2](middle)
        features = self.latent(F.leaky_relu(self.bottom(coarse), SLOPE))
        x = self.decoder[0](features, coarse)
        x = self.decoder[1](x, middle)
        x = self.decoder[2](x, finest, shallow)
        rough = torch.tanh(self.image(shallow - F.leaky_relu(self.rain(x), SLOPE)))
        derained = torch.sigmoid(self.tail(F.leaky_relu(self.refinement(rough), SLOPE)))
        return {"derained": derained, "features": features}

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return all arguments of ``__init__``; None for another network."""
        if cls.signature not in state:
            return None
        channels = len(state["conv_input.weight"])
        block_channels = 8 * channels  # of block 4
        width, group_width = state["dense_block4.convs.0.weight"].shape[:2]
        return {
            "channels": channels,
            "base_width": math.ceil(group_width * 64 / block_channels),
            "groups": width // group_width,
            "parts": count_numbered(state, r"dense_block1\.convs\.(\d+)\.") + 1,
        }
