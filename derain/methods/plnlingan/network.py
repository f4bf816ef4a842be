"""PLNLIN and MCDDL: generator and discriminator of interacting local and non-local branches.

Wang et al., Progressive Local and Non-Local Interactive Networks with Deeply Discriminative Training for Image
Deraining, MM 2024. Features have the axes ``(b, h, w, c)``, so that layer normalisation reads contiguous memory and
convolutions run in the channels-last memory format.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.padding import pad_to_multiple
from derain.nn.restormer import spatial
from derain.nn.shifted_windows import WindowBlock

Features = Float[Tensor, "b h w c"]
Branches = Literal["both", "local", "non-local"]
Interaction = Literal["sft", "concatenation", "none"]
Unit = Literal["plnlim", "local", "non-local"]

SCALES = 4
"""Number of scales of the encoder-decoder, the hierarchy and the discriminator: 1, 1/2, 1/4 and 1/8."""

WINDOW = 7
"""Side of the attention windows, in pixels of the features."""


class UnitConfig(NamedTuple):
    """Configuration of the units of a generator or discriminator; the paper's ablations change it.

    Attributes:
        channels: Channels of the features.
        unit: ``plnlim``; or a chain of residual blocks (``local``) or of Swin blocks (``non-local``; Tables 4, 6).
        branches: ``both``; ``local`` or ``non-local`` for two branches of that kind (Table 3 c, d).
        interaction: Interaction of the branches: ``sft``, ``concatenation`` (Table 3 b) or ``none`` (Table 3 e).
        fusion: Whether there is a fusion branch (Table 3 a has none).
        last_interaction: Whether the branches interact after their last stage too, as in eq. 5 with ``i = N``.
        heads: Attention heads of the Swin blocks; must divide ``channels``.
    """

    channels: int = 32
    unit: Unit = "plnlim"
    branches: Branches = "both"
    interaction: Interaction = "sft"
    fusion: bool = True
    last_interaction: bool = True
    heads: int = 4


class ResidualBlock(nn.Module):
    """Residual block of two 3×3 convolutions: the local block.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Features) -> Features:
        """Transform features."""
        hidden = F.leaky_relu(spatial(x, self.conv1), 0.2)
        return x + spatial(hidden, self.conv2)


class SFT(nn.Module):
    """Spatial feature transform (SFT): scales and shifts features depending on those of another branch.

    Two 1×1 convolutions compute the scale γ, and two the shift β. The first ones of both pairs are one layer.

    Shape:
        ``(b, h, w, channels)`` twice → ``(b, h, w, channels)``.

    References:
        Wang et al., CVPR 2018, section 3.2, as in their code: ``x · (1 + γ) + β``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 2 * channels)
        self.scale = nn.Linear(channels, channels)
        self.shift = nn.Linear(channels, channels)

    def forward(self, x: Features, condition: Features) -> Features:
        """Return ``x`` scaled and shifted depending on the condition."""
        for_scale, for_shift = F.leaky_relu(self.hidden(condition), 0.1).chunk(2, dim=-1)
        return torch.addcmul(x + self.shift(for_shift), x, self.scale(for_scale))


class ConcatLinear(nn.Linear):
    """1×1 convolution of concatenated maps, computed without concatenating them.

    Shape:
        Any number of maps ``(b, h, w, _)``, ``in_features`` channels in total → ``(b, h, w, out_features)``.
    """

    def forward(self, *maps: Float[Tensor, "b h w _"]) -> Float[Tensor, "b h w _"]:
        """Return the sum of the maps, each multiplied by its columns of the weight, plus the bias."""
        weights = torch.split(self.weight, [features.shape[-1] for features in maps], dim=1)
        total = F.linear(maps[0], weights[0], self.bias).flatten(0, 2)
        for features, weight in zip(maps[1:], weights[1:], strict=True):
            total = torch.addmm(total, features.flatten(0, 2), weight.t())
        return total.view(*maps[0].shape[:3], -1)


class PLNLIM(nn.Module):
    """Progressive local and non-local interactive module.

    Args:
        stages: Number of stages N. The local and the non-local branch have N + 1 blocks each. They interact N times;
            without ``last_interaction`` N - 1 times; with interaction ``none`` never.
        config: Configuration of the module.

    Shape:
        ``(b, h, w, channels)`` → same; height and width must be multiples of the window.

    References:
        Wang et al., MM 2024, eqs. 2 to 6. SFT(RB(a, b)) in eq. 5 is read as SFT(RB(a), b), as in eq. 4.
    """

    def __init__(self, stages: int, config: UnitConfig) -> None:
        super().__init__()
        local, non_local = ("local", "non-local") if config.branches == "both" else (config.branches, config.branches)
        self.local = nn.ModuleList(_block(local, index, config) for index in range(stages + 1))
        self.non_local = nn.ModuleList(_block(non_local, index, config) for index in range(stages + 1))
        interactions = stages if config.last_interaction else stages - 1
        if config.interaction == "none":
            interactions = 0
        self.interactions = nn.ModuleList(
            nn.ModuleList([_interaction(config), _interaction(config)]) for _ in range(interactions)
        )
        map_counts = [2, *[3] * stages] if config.fusion else []
        self.fusions = nn.ModuleList(ConcatLinear(count * config.channels, config.channels) for count in map_counts)

    def forward(self, x: Features) -> Features:
        """Transform features."""
        return self.branches(x)[-1]

    def branches(self, x: Features) -> tuple[Features, Features, Features]:
        """Return the outputs of the first and of the second branch, and the sum of all branches (eq. 6)."""
        local, non_local, fused = x, x, x
        stages = len(self.local) - 1
        for index in range(stages):
            local = self.local[index](local)
            non_local = self.non_local[index](non_local)
            if index == 0 and len(self.fusions):
                fused = self.fusions[0](local, non_local)
            if index < len(self.interactions):
                to_local, to_non_local = cast(nn.ModuleList, self.interactions[index])
                local, non_local = to_local(local, non_local), to_non_local(non_local, local)
            if index > 0 and len(self.fusions):
                fused = self.fusions[index](fused, local, non_local)
        last_local: Tensor = self.local[stages](local)
        last_non_local: Tensor = self.non_local[stages](non_local)
        total = last_local + last_non_local
        if len(self.fusions):
            total = total + self.fusions[-1](fused, local, non_local)
        return last_local, last_non_local, total


def _block(kind: str, index: int, config: UnitConfig) -> nn.Module:
    """Return a block of a branch; every second Swin block has shifted windows."""
    if kind == "local":
        return ResidualBlock(config.channels)
    return WindowBlock(config.channels, config.heads, WINDOW, shifted=index % 2 == 1)


def _interaction(config: UnitConfig) -> nn.Module:
    if config.interaction == "sft":
        return SFT(config.channels)
    return ConcatLinear(2 * config.channels, config.channels)


def check_config(config: UnitConfig, *stages: int, network: str = "generator") -> None:
    """Check the configuration of a network.

    Args:
        config: Configuration of the units.
        *stages: Number of stages of each unit.
        network: Name of the network in messages.

    Raises:
        DerainError: If a number is below 1, a kind is unknown, or a chain of blocks is configured with ``branches``,
            ``interaction`` or ``fusion`` other than the defaults.
    """
    for name, value, kinds in (
        ("unit", config.unit, get_args(Unit)),
        ("branches", config.branches, get_args(Branches)),
        ("interaction", config.interaction, get_args(Interaction)),
    ):
        if value not in kinds:
            raise DerainError(f"{network} with {name} {value!r}: expected {', '.join(kinds)}")
    if min(config.channels, config.heads, *stages) < 1:
        raise DerainError(
            f"{network} with {config.channels} channels, {config.heads} heads, stages {', '.join(map(str, stages))}: "
            "each must be at least 1"
        )
    if config.unit != "plnlim" and (config.branches, config.interaction, config.fusion) != ("both", "sft", True):
        raise DerainError(
            f"--model.unit {config.unit}: has no branches, interaction or fusion; omit these options or use plnlim"
        )


def build_unit(stages: int, config: UnitConfig) -> nn.Module:
    """Return a PLNLIM with ``stages`` stages, or a chain of ``stages + 1`` blocks like one of its branches."""
    if config.unit == "plnlim":
        return PLNLIM(stages, config)
    return nn.Sequential(*(_block(config.unit, index, config) for index in range(stages + 1)))


class Restored(NamedTuple):
    """Output of the generator.

    Attributes:
        derained: Derained images, ``(b, 3, h, w)``, not clamped.
        images: Images of the hierarchy (eq. 11), the finest first, ``(b, 3, h/2ᵏ, w/2ᵏ)`` with the padded ``h`` and
            ``w``. Empty unless requested.
        features: Features from which these images are computed (eq. 7), ``(b, h/2ᵏ, w/2ᵏ, c)``. Empty unless requested.
        shown: Features of the decoder's finest unit, ``(b, h, w, c)`` each: the first and the second branch of a PLNLIM
            and the sum of all branches, or the output of a chain of blocks. Empty unless requested.
    """

    derained: Tensor
    images: list[Tensor]
    features: list[Tensor]
    shown: tuple[Tensor, ...] = ()


class PLNLIN(nn.Module):
    """Generator: encoder-decoder of PLNLIMs, supervised at four scales.

    Args:
        config: Configuration of the units.
        stages: Number of stages N of the encoder's PLNLIM at each of four scales, the finest first; the decoder has the
            same numbers.
        hierarchy: Number of stages N of the PLNLIMs for hierarchical supervision; 0: no such PLNLIMs.

    Shape:
        ``(b, 3, h, w)`` in [0, 1], any ``h, w >= 1`` → `Restored`. Images are padded to multiples of 56 pixels, so that
        attention windows fit the coarsest scale too.

    Attributes:
        multiple: Multiple that height and width are padded to: 56.

    Raises:
        DerainError: If an argument is out of its range.

    References:
        Wang et al., MM 2024, Figure 1 and section 3.1. By default, with ``UnitConfig()``, the network has 2,251,423
        parameters.
    """

    def __init__(self, config: UnitConfig, stages: Sequence[int] = (8, 4, 2, 2), hierarchy: int = 2) -> None:
        super().__init__()
        if len(stages) != SCALES or min(*stages, hierarchy + 1) < 1:
            raise DerainError(
                f"--model.stages {list(stages)}, --model.hierarchy {hierarchy}: expected {SCALES} stages of at least "
                "1, and a hierarchy of at least 0"
            )
        check_config(config, *stages)
        channels = config.channels
        self.multiple = WINDOW << (SCALES - 1)
        self.embed = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder = nn.ModuleList(build_unit(count, config) for count in stages)
        self.decoder = nn.ModuleList(build_unit(count, config) for count in stages)
        self.up = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in stages[1:])
        self.output = nn.Conv2d(channels, 3, 3, padding=1)
        scales = range(SCALES if hierarchy else 0)
        self.joins = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in scales)
        self.supervised = nn.ModuleList(build_unit(hierarchy, config) for _ in scales)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1) for _ in scales)
        self.apply(initialize)

    def forward(self, rainy: Float[Tensor, "b 3 h w"], hierarchy: bool = False, show: bool = False) -> Restored:
        """Restore images.

        Args:
            rainy: Rainy images in [0, 1].
            hierarchy: Whether to compute the images and features of the hierarchy.
            show: Whether to return the features of the decoder's finest unit.
        """
        height, width = rainy.shape[2:]
        padded = pad_to_multiple(rainy, self.multiple)
        encoded = self._encode(padded)
        decoded, shown = self._decode(encoded, show)
        derained = spatial(decoded[0], self.output).permute(0, 3, 1, 2) + padded
        images: list[Tensor] = []
        features: list[Tensor] = []
        if hierarchy:
            for scale, (join, supervise) in enumerate(zip(self.joins, self.supervised, strict=True)):
                joined = torch.cat((encoded[scale], decoded[scale]), dim=-1)
                features.append(supervise(spatial(joined, join)))
                images.append(spatial(features[-1], self.outputs[scale]).permute(0, 3, 1, 2))
        shown = tuple(part[:, :height, :width] for part in shown)
        return Restored(derained[:, :, :height, :width], images, features, shown)

    def _encode(self, padded: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Return the encoder's features of padded images, the finest scale first."""
        x = spatial(padded.permute(0, 2, 3, 1).contiguous(), self.embed)
        encoded: list[Tensor] = []
        for scale, unit in enumerate(self.encoder):
            if scale > 0:
                x = downsample(x)
            x = unit(x)
            encoded.append(x)
        return encoded

    def _decode(self, encoded: list[Tensor], show: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return the decoder's features, the finest scale first; and ``shown`` of `Restored`, if ``show`` is true."""
        decoded = [self.decoder[-1](encoded[-1])]
        shown: tuple[Tensor, ...] = ()
        for scale in reversed(range(SCALES - 1)):
            x = spatial(upsample(decoded[0]), self.up[scale]) + encoded[scale]
            unit = self.decoder[scale]
            if show and scale == 0:
                shown = unit.branches(x) if isinstance(unit, PLNLIM) else (unit(x),)
                decoded.insert(0, shown[-1])
            else:
                decoded.insert(0, unit(x))
        return decoded, shown


class MCDDL(nn.Module):
    """Discriminator: returns logits of an image, given the generator's features of the image at four scales.

    Args:
        config: Configuration of the units.
        content_channels: Channels of the generator's features; 0: the discriminator receives images alone.
        deep: Whether every scale has logits, or only the coarsest.
        stages: Number of stages N of the PLNLIMs.

    Raises:
        DerainError: If an argument is out of its range.

    References:
        Wang et al., MM 2024, eqs. 7 and 8, section 4.1. By default, with ``UnitConfig()``, the network has 679,968
        parameters.
    """

    def __init__(self, config: UnitConfig, content_channels: int = 32, deep: bool = True, stages: int = 2) -> None:
        super().__init__()
        check_config(config, stages, network="discriminator")
        channels = config.channels
        self.embed = nn.Conv2d(3, channels, 3, padding=1)
        self.first = build_unit(stages, config)
        joined_scales = range(SCALES if content_channels else 0)
        self.joins = nn.ModuleList(
            nn.Conv2d(channels + content_channels, channels, 3, padding=1) for _ in joined_scales
        )
        self.units = nn.ModuleList(build_unit(stages, config) for _ in range(SCALES))
        self.logit_scales = range(SCALES) if deep else range(SCALES - 1, SCALES)
        self.logits = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for _ in self.logit_scales)
        self.apply(initialize)

    def forward(self, images: Float[Tensor, "b 3 h w"], features: Sequence[Float[Tensor, "b _ _ _"]]) -> list[Tensor]:
        """Return the logits of images whose height and width are multiples of 56.

        Args:
            images: Derained or clean images.
            features: The generator's features of the images, the finest scale first; ignored if ``content_channels`` is
                0.

        Returns:
            Logits ``(b, 1, h/2ᵏ, w/2ᵏ)`` of each scale, the finest first, or of the coarsest scale alone. Training
            raises the logits of clean images.
        """
        x = self.first(spatial(images.permute(0, 2, 3, 1).contiguous(), self.embed))
        logits: list[Tensor] = []
        for scale in range(SCALES):
            if scale > 0:
                x = downsample(x)
            if len(self.joins):
                x = spatial(torch.cat((features[scale], x), dim=-1), self.joins[scale])
            x = self.units[scale](x)
            if scale in self.logit_scales:
                logits.append(spatial(x, self.logits[len(logits)]).permute(0, 3, 1, 2))
        return logits


def feature_map(features: Features) -> Float[Tensor, "b 1 h w"]:
    """Return the mean magnitude m of the features at each pixel as ``m / (m + mean)``, with the mean over the image.

    Values are in [0, 1); pixels of average magnitude have the value 0.5.
    """
    magnitude = features.float().abs().mean(-1)[:, None]
    mean = magnitude.mean((2, 3), keepdim=True)
    return magnitude / (magnitude + mean).clamp_min(torch.finfo(magnitude.dtype).tiny)


def initialize(module: nn.Module) -> None:
    """Initialise a convolution or linear layer as Swin does: truncated normal weights (σ = 0.02), zero biases.

    With PyTorch's default initialisation, features would overflow, since many SFT layers multiply them by each other.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def downsample(x: Features) -> Float[Tensor, "b h2 w2 c"]:
    """Halve height and width by max pooling."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def upsample(x: Features) -> Float[Tensor, "b h2 w2 c"]:
    """Double height and width by bilinear interpolation."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="bilinear").permute(0, 2, 3, 1)
