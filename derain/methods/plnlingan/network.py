"""PLNLIN and MCDDL: local and non-local branches that inform each other, in a generator and its discriminator.

Wang et al., Progressive Local and Non-Local Interactive Networks with Deeply Discriminative Training for Image
Deraining, MM 2024. Features are ``(b, h, w, c)``: windows and pixels are normalised along contiguous memory, and
convolutions see channels last.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from derain.errors import DerainError
from derain.methods.plnlingan.shifted_windows import at_any_size, shift_mask
from derain.nn.graphs import recorded_for_all_sizes
from derain.nn.padding import pad_to_multiple
from derain.nn.restormer import STRIP_BYTES, spatial

Features = Float[Tensor, "b h w c"]
Widths = Float[Tensor, "b h w _"]
Sizes = Float[Tensor, "b _ _ _"]
Branches = Literal["both", "local", "non-local"]
Interaction = Literal["sft", "concatenation", "none"]
Unit = Literal["plnlim", "local", "non-local"]

SCALES = 4
"""Of the hierarchy: 1, 1/2, 1/4, 1/8."""


class Style(NamedTuple):
    """How a network's units are built; the paper's ablations change one thing each.

    Attributes:
        channels: Width of the features.
        unit: ``plnlim``, or chains of residual (``local``) or Swin blocks (``non-local``) in its place (Tables 4, 6).
        branches: ``both``, or both of them ``local`` or ``non-local`` (Table 3 c, d).
        interaction: Of the branches: ``sft``, ``concatenation`` (Table 3 b) or ``none`` (Table 3 e).
        fusion: Whether there is a fusion branch (without: Table 3 a).
        last_interaction: Whether the branches interact after their last stage too, as eq. 5 has it for ``i = N``.
        heads: Of the attention.
        window: Its side.
        expansion: Hidden width of the Swin blocks' MLP over ``channels``.
    """

    channels: int = 32
    unit: Unit = "plnlim"
    branches: Branches = "both"
    interaction: Interaction = "sft"
    fusion: bool = True
    last_interaction: bool = True
    heads: int = 4
    window: int = 7
    expansion: float = 4.0


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a short cut; what happens here is local.

    Shape:
        ``(b, h, w, channels)`` → same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Features) -> Features:
        """Transforms features."""
        return x + spatial(F.leaky_relu(spatial(x, self.conv1), 0.2), self.conv2)


class WindowBlock(SwinTransformerBlock):
    """timm's Swin block for maps of any size: masks are built once a size, and memory is bounded at inference.

    Without gradients, rows of windows are worked on one after the other, so that what is computed of them stays in a
    processor's cache.

    Shape:
        ``(b, h, w, channels)`` → same; sides must be multiples of the window.

    References:
        Liu et al., Swin Transformer, ICCV 2021, eq. 3; a map of one window is not shifted.
    """

    def __init__(self, style: Style, shifted: bool) -> None:
        if style.channels % style.heads:
            raise DerainError(f"{style.heads} heads do not divide {style.channels} channels; choose others")
        super().__init__(
            style.channels,
            (style.window, style.window),
            num_heads=style.heads,
            window_size=style.window,
            mlp_ratio=style.expansion,
        )
        self.side, self.shift = style.window, style.window // 2 if shifted else 0

    def forward(self, x: Features) -> Features:
        """Transforms features."""
        if recorded_for_all_sizes():
            return at_any_size(x, self.side, self.shift, self._transform)
        height, width = x.shape[1:3]
        down, right = (self.shift if length > self.side else 0 for length in (height, width))
        if down or right:
            x = torch.roll(x, (-down, -right), (1, 2))
        rows = height
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            budget = STRIP_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
            row = x.shape[0] * width * self.side**3 * self.attn.num_heads * x.element_size()
            rows = max(1, budget // row) * self.side
        if rows >= height:
            x = self._transform(x, self._mask(x, down, right))
        else:
            whole, x = x, torch.empty_like(x)
            for top in range(0, height, rows):
                strip = whole[:, top : top + rows]
                mask = self._mask(strip, down if top + rows >= height else 0, right)
                x[:, top : top + rows] = self._transform(strip, mask)
        return torch.roll(x, (down, right), (1, 2)) if down or right else x

    def _mask(self, part: Features, down: int, right: int) -> Tensor | None:
        """What keeps pixels apart that only the roll made neighbours, for the windows of a strip of rows."""
        if not (down or right):
            return None
        _, height, width, _ = part.shape
        build = shift_mask.__wrapped__ if torch.compiler.is_compiling() else shift_mask
        return build(height, width, self.side, down, right, part.device)

    def _transform(self, x: Features, mask: Tensor | None) -> Features:
        """Attention within windows and MLP, each after a normalisation and beside a short cut."""
        _, height, width, channels = x.shape
        windows = window_partition(self.norm1(x), self.window_size).flatten(1, 2)
        mixed = self.attn(windows, mask=None if mask is None else mask.to(x.dtype))
        x = x + window_reverse(mixed.view(-1, self.side, self.side, channels), self.window_size, height, width)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class SFT(nn.Module):
    """Spatial feature transform: each pixel is scaled and shifted by what another branch found there.

    Two 1×1 convolutions give the scale, two the shift; the first ones of both are computed as one.

    Shape:
        Twice ``(b, h, w, channels)`` → the same once.

    References:
        Wang et al., CVPR 2018, section 3.2, as their code has it: ``x · (1 + γ) + β``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 2 * channels)
        self.scale, self.shift = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Features, condition: Features) -> Features:
        """Modulates ``x`` by the condition."""
        for_scale, for_shift = F.leaky_relu(self.hidden(condition), 0.1).chunk(2, dim=-1)
        return torch.addcmul(x + self.shift(for_shift), x, self.scale(for_scale))


class Mix(nn.Linear):
    """A 1×1 convolution of several maps as if they were concatenated.

    Shape:
        Several times ``(b, h, w, c)``, ``in_features`` channels together → ``(b, h, w, out_features)``.
    """

    def forward(self, *maps: Widths) -> Widths:
        """Mixes the maps, each by its part of the weights."""
        first, *others = torch.split(self.weight, [one.shape[-1] for one in maps], dim=1)
        mixed = F.linear(maps[0], first, self.bias).flatten(0, 2)
        for one, weight in zip(maps[1:], others, strict=True):
            mixed = torch.addmm(mixed, one.flatten(0, 2), weight.t())
        return mixed.view(*maps[0].shape[:3], -1)


class PLNLIM(nn.Module):
    """Progressive local and non-local interactive module.

    Args:
        stages: N; the branches have a block more, and interact N times.
        style: How it is built.

    Shape:
        ``(b, h, w, channels)`` → same; sides must be multiples of the window.

    References:
        Wang et al., MM 2024, eqs. 2 to 6; eq. 5 read as SFT(RB(a), b), of which eq. 4 is the first instance.
    """

    def __init__(self, stages: int, style: Style) -> None:
        super().__init__()
        kinds = (style.branches, style.branches) if style.branches != "both" else ("local", "non-local")
        self.local, self.non_local = (
            nn.ModuleList(_block(cast(Branches, kind), place, style) for place in range(stages + 1)) for kind in kinds
        )
        exchange: dict[Interaction, Callable[[], nn.Module]] = {
            "sft": partial(SFT, style.channels),
            "concatenation": partial(Mix, 2 * style.channels, style.channels),
        }
        pairs = (stages if style.last_interaction else stages - 1) if style.interaction in exchange else 0
        self.interactions = nn.ModuleList(
            nn.ModuleList(exchange[style.interaction]() for _ in range(2)) for _ in range(pairs)
        )
        widths = [2, *[3] * stages] if style.fusion else []
        self.fusions = nn.ModuleList(Mix(width * style.channels, style.channels) for width in widths)

    def forward(self, x: Features) -> Features:
        """Transforms features."""
        return self.branches(x)[-1]

    def branches(self, x: Features) -> tuple[Features, Features, Features]:
        """Return the features of the first branch, of the second, and what the module makes of both (eq. 6)."""
        local, non_local, fused = x, x, x
        *_, last_local = self.local
        *_, last_non_local = self.non_local
        for place in range(len(self.local) - 1):
            local, non_local = self.local[place](local), self.non_local[place](non_local)
            if place == 0 and len(self.fusions):
                fused = self.fusions[0](local, non_local)
            if place < len(self.interactions):
                to_local, to_non_local = cast(nn.ModuleList, self.interactions[place])
                local, non_local = to_local(local, non_local), to_non_local(non_local, local)
            if place > 0 and len(self.fusions):
                fused = self.fusions[place](fused, local, non_local)
        first: Tensor = last_local(local)
        second: Tensor = last_non_local(non_local)
        out = first + second
        return first, second, out + self.fusions[-1](fused, local, non_local) if len(self.fusions) else out


def _block(kind: Branches, place: int, style: Style) -> nn.Module:
    return ResidualBlock(style.channels) if kind == "local" else WindowBlock(style, shifted=place % 2 == 1)


def check(style: Style, *stages: int, of: str = "generator") -> None:
    """Refuses what no network can be built of.

    Raises:
        DerainError: If a size is below 1, or a chain is to have what only PLNLIMs have.
    """
    if min(style.channels, style.heads, *stages) < 1:
        told = f"{style.channels} channels, {style.heads} heads and stages of {', '.join(map(str, stages))}"
        raise DerainError(f"--model: a {of} of {told}; each must be at least 1")
    if style.unit != "plnlim" and (style.branches, style.interaction, style.fusion) != ("both", "sft", True):
        raise DerainError(f"--model.unit {style.unit}: has no branches, interaction or fusion; leave these options out")


def unit(stages: int, style: Style) -> nn.Module:
    """A PLNLIM, or as many blocks in a chain as one of its branches has."""
    if style.unit == "plnlim":
        return PLNLIM(stages, style)
    return nn.Sequential(*(_block(style.unit, place, style) for place in range(stages + 1)))


class Restored(NamedTuple):
    """What the generator gives.

    Attributes:
        derained: ``(b, 3, h, w)``, in about [0, 1].
        images: Of the hierarchy, the finest first, ``(b, 3, h/2ᵏ, w/2ᵏ)`` of the padded image; eq. 11.
        features: That they are made of, ``(b, h/2ᵏ, w/2ᵏ, c)``; eq. 7.
        shown: Features of the finest unit of the decoder, ``(b, h, w, c)`` each: of a PLNLIM's branches and of what it
            makes of both, of a chain of blocks what it gives.
    """

    derained: Tensor
    images: list[Tensor]
    features: list[Tensor]
    shown: tuple[Tensor, ...] = ()


class PLNLIN(nn.Module):
    """The generator: an encoder-decoder of PLNLIMs, supervised at four scales.

    Args:
        style: How its units are built.
        stages: N of the PLNLIMs, from the finest to the coarsest; the decoder has the same.
        hierarchy: N of the PLNLIMs that are supervised in between; 0 for none.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, any ``h, w >= 1``: the image is padded to a multiple of 8 windows, so that
        windows fit the coarsest scale too.

    References:
        Wang et al., MM 2024, Figure 1 and section 3.1. 2,251,423 parameters by default, 1,690,851 of them without the
        hierarchy.
    """

    def __init__(self, style: Style, stages: Sequence[int] = (8, 4, 2, 2), hierarchy: int = 2) -> None:
        super().__init__()
        if len(stages) != SCALES or min(*stages, hierarchy + 1) < 1:
            raise DerainError(
                f"--model.stages {list(stages)}, --model.hierarchy {hierarchy}: give four stages of at least 1, and a "
                "hierarchy of at least 0"
            )
        check(style, *stages)
        channels = style.channels
        self.multiple = style.window << (SCALES - 1)
        self.embed = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder = nn.ModuleList(unit(count, style) for count in stages)
        self.decoder = nn.ModuleList(unit(count, style) for count in stages)
        self.up = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in stages[1:])
        self.output = nn.Conv2d(channels, 3, 3, padding=1)
        scales = range(SCALES if hierarchy else 0)
        self.joins = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in scales)
        self.supervised = nn.ModuleList(unit(hierarchy, style) for _ in scales)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1) for _ in scales)
        self.apply(start)

    def forward(self, rainy: Float[Tensor, "b 3 h w"], hierarchy: bool = False, show: bool = False) -> Restored:
        """Restores images, with the hierarchy and with features to show only where they are asked for."""
        height, width = rainy.shape[2:]
        padded = pad_to_multiple(rainy, self.multiple)
        x = spatial(padded.permute(0, 2, 3, 1).contiguous(), self.embed)
        encoded = []
        for place, encode in enumerate(self.encoder):
            x = encode(halved(x) if place else x)
            encoded.append(x)
        decoded = [self.decoder[-1](x)]
        shown: tuple[Tensor, ...] = ()
        for place in reversed(range(SCALES - 1)):
            x = spatial(doubled(decoded[0]), self.up[place]) + encoded[place]
            decode = self.decoder[place]
            if show and place == 0:
                shown = decode.branches(x) if isinstance(decode, PLNLIM) else (decode(x),)
            decoded.insert(0, shown[-1] if shown else decode(x))
        derained = spatial(decoded[0], self.output).permute(0, 3, 1, 2) + padded
        features, images = [], []
        if hierarchy:
            for place, (join, supervise) in enumerate(zip(self.joins, self.supervised, strict=True)):
                features.append(supervise(spatial(torch.cat((encoded[place], decoded[place]), dim=-1), join)))
                images.append(spatial(features[-1], self.outputs[place]).permute(0, 3, 1, 2))
        shown = tuple(one[:, :height, :width] for one in shown)
        return Restored(derained[:, :, :height, :width], images, features, shown)


class MCDDL(nn.Module):
    """The discriminator: it sees an image and the generator's features of it, and judges at four scales.

    Args:
        style: How its units are built.
        content: Channels of the generator's features; 0 if it sees only the image ([71], Table 1).
        deep: Whether every scale is judged, or only the coarsest ([9], Table 1).
        stages: N of its PLNLIMs.

    References:
        Wang et al., MM 2024, eqs. 7 and 8, section 4.1. 679,968 parameters by default.
    """

    def __init__(self, style: Style, content: int = 32, deep: bool = True, stages: int = 2) -> None:
        super().__init__()
        check(style, stages, of="discriminator")
        channels = style.channels
        self.embed = nn.Conv2d(3, channels, 3, padding=1)
        self.first = unit(stages, style)
        joins = range(SCALES if content else 0)
        self.joins = nn.ModuleList(nn.Conv2d(channels + content, channels, 3, padding=1) for _ in joins)
        self.units = nn.ModuleList(unit(stages, style) for _ in range(SCALES))
        self.judged = range(SCALES) if deep else range(SCALES - 1, SCALES)
        self.logits = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for _ in self.judged)
        self.apply(start)

    def forward(self, image: Float[Tensor, "b 3 h w"], features: Sequence[Sizes]) -> list[Tensor]:
        """Judges images with sides that are multiples of 8 windows.

        Args:
            image: Derained or clean.
            features: The generator's of it, by scale, the finest first; not looked at without content.

        Returns:
            Logits ``(b, 1, h/2ᵏ, w/2ᵏ)`` of every scale that is judged, the finest first; the higher, the cleaner.
        """
        x = self.first(spatial(image.permute(0, 2, 3, 1).contiguous(), self.embed))
        logits: list[Tensor] = []
        for place in range(SCALES):
            x = halved(x) if place else x
            if len(self.joins):
                x = spatial(torch.cat((features[place], x), dim=-1), self.joins[place])
            x = self.units[place](x)
            if place in self.judged:
                logits.append(spatial(x, self.logits[len(logits)]).permute(0, 3, 1, 2))
        return logits


def feature_map(features: Features) -> Float[Tensor, "b 1 h w"]:
    """Return the mean magnitude of each pixel's features as a grey image in [0, 1): 0.5 is the image's mean."""
    magnitude = features.float().abs().mean(-1)[:, None]
    mean = magnitude.mean((2, 3), keepdim=True)
    return magnitude / (magnitude + mean).clamp_min(torch.finfo(magnitude.dtype).tiny)


def start(module: nn.Module) -> None:
    """First weights as Swin's: by PyTorch's, each of many SFT layers would square the features, until they overflow."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def halved(x: Features) -> Sizes:
    """The largest of 2×2 pixels each."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def doubled(x: Features) -> Sizes:
    """Twice as high and wide, bilinear."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="bilinear").permute(0, 2, 3, 1)
