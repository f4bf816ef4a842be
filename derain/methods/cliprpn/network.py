"""CLIP-RPN: Restormer with masks of rain and routed cross-attention before each upsampling."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.restormer import CrossAttention, Restormer, spatial

Interaction = Literal["prose", "swapped"]
LEVELS = (3, 2, 1)
"""Levels whose features are routed, in the order of the decoder: at 1/8, 1/4 and 1/2 of the image."""


class Restored(NamedTuple):
    """What the network gives.

    Attributes:
        derained: ``(b, 3, h, w)``.
        logits: Of the masks at 1/8, 1/4 and 1/2 of the padded image, ``(b, 1, _, _)`` each; empty without masks.
    """

    derained: Tensor
    logits: list[Tensor]


class MaskHead(nn.Module):
    """Predicts where there is rain from features.

    References:
        CLIP-RPN, eq. 3, read on features as its parameter count demands; here without the sigmoid.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.logit = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w 1"]:
        """Logit of rain for every pixel."""
        return spatial(nn.functional.gelu(spatial(x, self.features)), self.logit)


class MaskGuidedCrossAttention(nn.Module):
    """Lets rainy and rain-free regions of a feature map inform each other ("MGCA").

    Args:
        channels: Width of the features.
        heads: Heads of its three cross-attentions.
        interaction: ``prose``: channels weighed by the rain-free branch multiply the rainy one, pixels weighed by
            the rainy branch multiply the rain-free one, as the text of the paper says twice and its equations too;
            ``swapped``: the reverse, as the place of eqs. 11 and 12 under that text could be read.
        residual: Add the input to the output; not in the paper.
        spatial_kernel: Side of the convolution that weighs pixels; 0: the mean of their average and their maximum.
        reduction: Channels over hidden channels of what weighs channels.

    References:
        CLIP-RPN, eqs. 7 to 13, Figure 1(b).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        interaction: Interaction = "prose",
        residual: bool = True,
        spatial_kernel: int = 7,
        reduction: int = 16,
    ) -> None:
        super().__init__()
        if spatial_kernel and spatial_kernel % 2 == 0:
            raise DerainError(f"spatial_kernel {spatial_kernel}: must be odd, or 0")
        hidden = max(1, channels // reduction)
        self.interaction, self.residual = interaction, residual
        self.rainy = CrossAttention(channels, heads)
        self.clear = CrossAttention(channels, heads)
        self.fusion = CrossAttention(channels, heads)
        self.from_mean, self.from_max = (
            nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False))
            for _ in range(2)
        )
        self.weigh_pixels = (
            nn.Conv2d(2, 1, spatial_kernel, padding=spatial_kernel // 2, bias=False) if spatial_kernel else None
        )

    def forward(self, x: Float[Tensor, "b h w c"], mask: Float[Tensor, "b h w 1"]) -> Float[Tensor, "b h w c"]:
        """Refines features, given how surely each pixel is rainy (0 to 1)."""
        rainy, clear = self.rainy(x * mask, x, x), self.clear(x * (1 - mask), x, x)
        if self.interaction == "prose":
            fused = rainy * self.channel_weights(clear) + clear * self.pixel_weights(rainy)
        else:
            fused = clear * self.channel_weights(rainy) + rainy * self.pixel_weights(clear)
        out = self.fusion(x, fused, fused)
        return cast(Tensor, x + out if self.residual else out)

    def channel_weights(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b 1 1 c"]:
        """Importance of each channel, eq. 12."""
        weights = self.from_mean(x.mean((1, 2))) + self.from_max(x.amax((1, 2)))
        return cast(Tensor, weights.sigmoid()[:, None, None])

    def pixel_weights(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w 1"]:
        """Importance of each pixel, eq. 11 with the convolution that it lacks."""
        pooled = torch.stack((x.mean(-1), x.amax(-1)), dim=-1)
        pooled = pooled.mean(-1, keepdim=True) if self.weigh_pixels is None else spatial(pooled, self.weigh_pixels)
        return pooled.sigmoid()


class PlainCrossAttention(CrossAttention):
    """What routes lead to without masks: attention of the features to themselves, beside a short cut."""

    def forward(self, x: Float[Tensor, "b h w c"], mask: None = None) -> Float[Tensor, "b h w c"]:  # type: ignore[override]
        """Refines features."""
        return x + super().forward(x, x, x)


class CLIPRPN(nn.Module):
    """The restoration network; which route an image takes is told from outside.

    Args:
        routes: Sub-networks at each of three levels; 0: none, which leaves Restormer.
        mgca: Sub-networks are mask-guided cross-attention; else plain cross-attention without masks.
        interaction: Of the cross-attention.
        residual: Of the cross-attention.
        spatial_kernel: Of the cross-attention.
        dim: As for Restormer, like the rest.
        blocks: Of the four levels.
        refinement: Blocks at the end.
        heads: Of the four levels.
        expansion: Of the feed-forward networks.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → the same, and the masks' logits.

    References:
        CLIP-RPN, Figure 1. 32,720,308 parameters with two routes.
    """

    def __init__(
        self,
        routes: int = 2,
        mgca: bool = True,
        interaction: Interaction = "prose",
        residual: bool = True,
        spatial_kernel: int = 7,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
    ) -> None:
        super().__init__()
        self.backbone = Restormer(dim, blocks, refinement, heads, expansion)
        widths = {level: (dim * 2**level, heads[level]) for level in LEVELS}

        def subnetwork(level: int) -> nn.Module:
            if not mgca:
                return PlainCrossAttention(*widths[level])
            return MaskGuidedCrossAttention(*widths[level], interaction, residual, spatial_kernel)

        self.masks = nn.ModuleDict({str(level): MaskHead(widths[level][0]) for level in LEVELS if mgca and routes})
        self.routes = nn.ModuleList(
            nn.ModuleDict({str(level): subnetwork(level) for level in LEVELS}) for _ in range(routes)
        )

    def forward(self, rainy: Float[Tensor, "b 3 h w"], routes: Sequence[int] | None = None) -> Restored:
        """Restores images.

        Args:
            rainy: In [0, 1].
            routes: The route of each image, or one for all; the first by default.

        Raises:
            ValueError: If routes are too few or too many, or do not exist.
        """
        logits: list[Tensor] = []
        taken = list(routes or [0])
        if len(taken) not in {1, len(rainy)} or not set(taken) <= set(range(max(1, len(self.routes)))):
            raise ValueError(f"routes {taken} for {len(rainy)} images and {len(self.routes)} routes")
        taken = taken[:1] if len(set(taken)) == 1 else taken

        def interact(level: int, x: Tensor) -> Tensor:
            mask = None
            if len(self.masks):
                logit = self.masks[str(level)](x)
                logits.append(logit.permute(0, 3, 1, 2))
                mask = logit.sigmoid()
            if not len(self.routes):
                return x
            if len(taken) == 1:
                return cast(Tensor, self._route(taken[0])[str(level)](x, mask))
            out = torch.empty_like(x)
            for route in sorted(set(taken)):
                places = torch.tensor([i for i, one in enumerate(taken) if one == route], device=x.device)
                part = self._route(route)[str(level)](x[places], None if mask is None else mask[places])
                out = out.index_copy(0, places, part.to(x.dtype))
            return out

        derained = self.backbone(rainy, interact)
        return Restored(derained, logits)

    def _route(self, place: int) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.routes[place])


def mask_maps(logits: Sequence[Float[Tensor, "b 1 _ _"]], height: int, width: int) -> Float[Tensor, "b n h w"]:
    """Masks of all levels at the image's size, the finest first, in [0, 1]."""
    finest = logits[-1]
    size = (finest.shape[2] * 2, finest.shape[3] * 2)
    maps = [nn.functional.interpolate(level.float().sigmoid(), size) for level in reversed(logits)]
    return torch.cat(maps, dim=1)[:, :, :height, :width]
