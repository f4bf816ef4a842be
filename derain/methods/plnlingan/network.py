"""PLNLIN and MCDDL: generator and discriminator of interacting local and non-local branches.

Wang et al., Progressive Local and Non-Local Interactive Networks with Deeply Discriminative Training for Image
Deraining, MM 2024. Features are ``(b, h, w, c)``: windows and pixels are normalised along contiguous memory, and
convolutions see channels last.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.padding import pad_to_multiple
from derain.nn.restormer import spatial
from derain.nn.shifted_windows import WindowBlock

Features = Float[Tensor, "b h w c"]
Widths = Float[Tensor, "b h w _"]
Sizes = Float[Tensor, "b _ _ _"]
Branches = Literal["both", "local", "non-local"]
Interaction = Literal["sft", "concatenation", "none"]
Unit = Literal["plnlim", "local", "non-local"]

SCALES = 4
"""Scales of the encoder-decoder and of the hierarchy: 1, 1/2, 1/4, 1/8."""

WINDOW = 7
"""Side of the attention windows."""


class Style(NamedTuple):
    """How the units of a network are built; each ablation of the paper changes one field.

    Attributes:
        channels: Width of the features.
        unit: ``plnlim``, or a chain of residual (``local``) or Swin blocks (``non-local``) instead (Tables 4, 6).
        branches: ``both``; ``local`` or ``non-local`` for two branches of that kind (Table 3 c, d).
        interaction: Interaction of the branches: ``sft``, ``concatenation`` (Table 3 b) or ``none`` (Table 3 e).
        fusion: Whether there is a fusion branch (without: Table 3 a).
        last_interaction: Whether the branches interact after their last stage too, as eq. 5 has it for ``i = N``.
        heads: Attention heads.
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
    """Spatial feature transform: scales and shifts each pixel by the features of another branch.

    Two 1×1 convolutions give the scale, two the shift; the first convolutions of both are computed as one.

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
        """Modulate ``x`` by the condition."""
        for_scale, for_shift = F.leaky_relu(self.hidden(condition), 0.1).chunk(2, dim=-1)
        return torch.addcmul(x + self.shift(for_shift), x, self.scale(for_scale))


class ConcatLinear(nn.Linear):
    """1×1 convolution of concatenated maps, computed without concatenating them.

    Shape:
        ``(b, h, w, c)`` each, ``in_features`` channels in total → ``(b, h, w, out_features)``.
    """

    def forward(self, *maps: Widths) -> Widths:
        """Sum the maps, each multiplied by its columns of the weight."""
        weights = torch.split(self.weight, [features.shape[-1] for features in maps], dim=1)
        total = F.linear(maps[0], weights[0], self.bias).flatten(0, 2)
        for features, weight in zip(maps[1:], weights[1:], strict=True):
            total = torch.addmm(total, features.flatten(0, 2), weight.t())
        return total.view(*maps[0].shape[:3], -1)


class PLNLIM(nn.Module):
    """Progressive local and non-local interactive module.

    Args:
        stages: N; each branch has N + 1 blocks, and the branches interact N times.
        style: How the module is built.

    Shape:
        ``(b, h, w, channels)`` → same; height and width must be multiples of the window.

    References:
        Wang et al., MM 2024, eqs. 2 to 6; eq. 5 read as SFT(RB(a), b), of which eq. 4 is the first instance.
    """

    def __init__(self, stages: int, style: Style) -> None:
        super().__init__()
        local, non_local = ("local", "non-local") if style.branches == "both" else (style.branches, style.branches)
        self.local = nn.ModuleList(_block(local, index, style) for index in range(stages + 1))
        self.non_local = nn.ModuleList(_block(non_local, index, style) for index in range(stages + 1))
        interactions = stages if style.last_interaction else stages - 1
        if style.interaction == "none":
            interactions = 0
        self.interactions = nn.ModuleList(
            nn.ModuleList([_interaction(style), _interaction(style)]) for _ in range(interactions)
        )
        fused_maps = [2, *[3] * stages] if style.fusion else []
        self.fusions = nn.ModuleList(ConcatLinear(count * style.channels, style.channels) for count in fused_maps)

    def forward(self, x: Features) -> Features:
        """Transform features."""
        return self.branches(x)[-1]

    def branches(self, x: Features) -> tuple[Features, Features, Features]:
        """Return the features of the first branch, of the second branch, and their sum with the fusion (eq. 6)."""
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


def _block(kind: str, index: int, style: Style) -> nn.Module:
    """Block of a branch; every second Swin block is shifted."""
    if kind == "local":
        return ResidualBlock(style.channels)
    return WindowBlock(style.channels, style.heads, WINDOW, shifted=index % 2 == 1)


def _interaction(style: Style) -> nn.Module:
    if style.interaction == "sft":
        return SFT(style.channels)
    return ConcatLinear(2 * style.channels, style.channels)


def check_style(style: Style, *stages: int, network: str = "generator") -> None:
    """Check that a network can be built.

    Raises:
        DerainError: If a size is below 1, or a chain of blocks is given an option that only PLNLIMs have.
    """
    if min(style.channels, style.heads, *stages) < 1:
        raise DerainError(
            f"{network} with {style.channels} channels, {style.heads} heads and stages {', '.join(map(str, stages))}: "
            "each must be at least 1"
        )
    if style.unit != "plnlim" and (style.branches, style.interaction, style.fusion) != ("both", "sft", True):
        raise DerainError(
            f"--model.unit {style.unit}: has no branches, interaction or fusion; omit these options or use plnlim"
        )


def build_unit(stages: int, style: Style) -> nn.Module:
    """Return a PLNLIM, or a chain of as many blocks as one of its branches has."""
    if style.unit == "plnlim":
        return PLNLIM(stages, style)
    return nn.Sequential(*(_block(style.unit, index, style) for index in range(stages + 1)))


class Restored(NamedTuple):
    """Output of the generator.

    Attributes:
        derained: ``(b, 3, h, w)``, in about [0, 1].
        images: Images of the hierarchy, the finest first, ``(b, 3, h/2ᵏ, w/2ᵏ)`` of the padded image; eq. 11.
        features: Features of these images, ``(b, h/2ᵏ, w/2ᵏ, c)``; eq. 7.
        shown: Features of the decoder's finest unit, ``(b, h, w, c)`` each: of a PLNLIM both branches and their sum,
            of a chain of blocks its output.
    """

    derained: Tensor
    images: list[Tensor]
    features: list[Tensor]
    shown: tuple[Tensor, ...] = ()


class PLNLIN(nn.Module):
    """Generator: encoder-decoder of PLNLIMs, supervised at four scales.

    Args:
        style: How its units are built.
        stages: N of the PLNLIMs of the encoder, from the finest to the coarsest scale; same for the decoder.
        hierarchy: N of the PLNLIMs of the hierarchical supervision; 0 for none.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, any ``h, w >= 1``: the image is padded to a multiple of 8 windows, so that
        windows fit the coarsest scale too.

    Raises:
        DerainError: If the network cannot be built.

    References:
        Wang et al., MM 2024, Figure 1 and section 3.1. 2,251,423 parameters by default, 1,690,851 of them without the
        hierarchy.
    """

    def __init__(self, style: Style, stages: Sequence[int] = (8, 4, 2, 2), hierarchy: int = 2) -> None:
        super().__init__()
        if len(stages) != SCALES or min(*stages, hierarchy + 1) < 1:
            raise DerainError(
                f"--model.stages {list(stages)}, --model.hierarchy {hierarchy}: expected {SCALES} stages of at least "
                "1, and a hierarchy of at least 0"
            )
        check_style(style, *stages)
        channels = style.channels
        self.multiple = WINDOW << (SCALES - 1)
        self.embed = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder = nn.ModuleList(build_unit(count, style) for count in stages)
        self.decoder = nn.ModuleList(build_unit(count, style) for count in stages)
        self.up = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in stages[1:])
        self.output = nn.Conv2d(channels, 3, 3, padding=1)
        scales = range(SCALES if hierarchy else 0)
        self.joins = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in scales)
        self.supervised = nn.ModuleList(build_unit(hierarchy, style) for _ in scales)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1) for _ in scales)
        self.apply(initialize)

    def forward(self, rainy: Float[Tensor, "b 3 h w"], hierarchy: bool = False, show: bool = False) -> Restored:
        """Restore images.

        Args:
            rainy: In [0, 1].
            hierarchy: Compute images and features of the hierarchy.
            show: Return the features of the decoder's finest unit.
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
        """Return the encoder's features, the finest scale first."""
        x = spatial(padded.permute(0, 2, 3, 1).contiguous(), self.embed)
        encoded: list[Tensor] = []
        for scale, unit in enumerate(self.encoder):
            if scale > 0:
                x = downsample(x)
            x = unit(x)
            encoded.append(x)
        return encoded

    def _decode(self, encoded: list[Tensor], show: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return the decoder's features, the finest scale first, and those of its finest unit if asked for."""
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
    """Discriminator: scores an image and the generator's features of it at four scales.

    Args:
        style: How its units are built.
        content: Channels of the generator's features; 0 for a discriminator of images alone ([71], Table 1).
        deep: Whether every scale has logits, or only the coarsest ([9], Table 1).
        stages: N of its PLNLIMs.

    Raises:
        DerainError: If the network cannot be built.

    References:
        Wang et al., MM 2024, eqs. 7 and 8, section 4.1. 679,968 parameters by default.
    """

    def __init__(self, style: Style, content: int = 32, deep: bool = True, stages: int = 2) -> None:
        super().__init__()
        check_style(style, stages, network="discriminator")
        channels = style.channels
        self.embed = nn.Conv2d(3, channels, 3, padding=1)
        self.first = build_unit(stages, style)
        joins = range(SCALES if content else 0)
        self.joins = nn.ModuleList(nn.Conv2d(channels + content, channels, 3, padding=1) for _ in joins)
        self.units = nn.ModuleList(build_unit(stages, style) for _ in range(SCALES))
        self.logit_scales = range(SCALES) if deep else range(SCALES - 1, SCALES)
        self.logits = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for _ in self.logit_scales)
        self.apply(initialize)

    def forward(self, image: Float[Tensor, "b 3 h w"], features: Sequence[Sizes]) -> list[Tensor]:
        """Score images whose height and width are multiples of 8 windows.

        Args:
            image: Derained or clean.
            features: The generator's features of the image, the finest scale first; ignored without ``content``.

        Returns:
            Logits ``(b, 1, h/2ᵏ, w/2ᵏ)`` of every scale that has some, the finest first; the higher, the cleaner.
        """
        x = self.first(spatial(image.permute(0, 2, 3, 1).contiguous(), self.embed))
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
    """Return the mean magnitude of each pixel's features as a grey image in [0, 1): 0.5 is the image's mean."""
    magnitude = features.float().abs().mean(-1)[:, None]
    mean = magnitude.mean((2, 3), keepdim=True)
    return magnitude / (magnitude + mean).clamp_min(torch.finfo(magnitude.dtype).tiny)


def initialize(module: nn.Module) -> None:
    """Initialise weights as Swin does.

    With PyTorch's defaults, each of many SFT layers would square the features, until they overflow.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def downsample(x: Features) -> Sizes:
    """Halve height and width by max pooling."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def upsample(x: Features) -> Sizes:
    """Double height and width by bilinear interpolation."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="bilinear").permute(0, 2, 3, 1)
