"""Network of CLIP-RPN: Restormer with rain masks and routed cross-attention before each upsampling."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.restormer import CrossAttention, Restormer, spatial

Interaction = Literal["prose", "swapped"]
"""Readings of eqs. 11 and 12, see `MaskGuidedCrossAttention`."""

LEVELS = (3, 2, 1)
"""Levels whose features are routed, in the order of the decoder: at 1/8, 1/4 and 1/2 of the image."""


class Restored(NamedTuple):
    """Output of the network.

    Attributes:
        derained: ``(b, 3, h, w)``, not clamped.
        logits: Logits of the rain masks at 1/8, 1/4 and 1/2 of the padded image, ``(b, 1, _, _)`` each; empty if the
            network predicts no masks.
    """

    derained: Tensor
    logits: list[Tensor]


class MaskHead(nn.Module):
    """Head that predicts the logits of the rain mask from features.

    Args:
        channels: Channels of the features.

    References:
        CLIP-RPN, eq. 3 without the sigmoid. Eq. 3 is printed for the image; the paper's parameter count implies
        features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.logit = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w 1"]:
        """Return the logit of rain at every pixel."""
        return spatial(nn.functional.gelu(spatial(x, self.features)), self.logit)


class MaskGuidedCrossAttention(nn.Module):
    """Mask-guided cross-attention (MGCA): exchange between rainy and rain-free regions of a feature map.

    Args:
        channels: Channels of the features.
        heads: Attention heads of each of the three cross-attentions.
        interaction: ``prose``, the reading of the paper's text: channel weights of the rain-free branch scale the rainy
            branch, and pixel weights of the rainy branch scale the rain-free branch. ``swapped``: channel weights of
            the rainy branch scale the rain-free branch, and pixel weights of the rain-free branch scale the rainy
            branch. The paper prints eqs. 11 and 12 in each other's paragraph.
        residual: Whether to add the input to the output; not in the paper.
        spatial_kernel: Kernel size, an odd number, of the convolution that reduces the average and the maximum over
            the channels to the pixel weights; 0: the mean of both instead of a convolution.
        reduction: Ratio of the channels to the hidden channels of the layers that compute the channel weights.

    Raises:
        DerainError: If ``spatial_kernel`` is even and not 0, or ``heads`` does not divide ``channels``.

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
            raise DerainError(f"--model.spatial_kernel {spatial_kernel}: expected an odd number, or 0")
        hidden = max(1, channels // reduction)
        self.interaction, self.residual = interaction, residual
        self.rainy = CrossAttention(channels, heads)
        self.clear = CrossAttention(channels, heads)
        self.fusion = CrossAttention(channels, heads)
        self.from_mean = _bottleneck(channels, hidden)
        self.from_max = _bottleneck(channels, hidden)
        self.weigh_pixels = None
        if spatial_kernel:
            self.weigh_pixels = nn.Conv2d(2, 1, spatial_kernel, padding=spatial_kernel // 2, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"], mask: Float[Tensor, "b h w 1"]) -> Float[Tensor, "b h w c"]:
        """Transform features; ``mask`` is the probability of rain at each pixel, in [0, 1]."""
        rainy = self.rainy(x * mask, x, x)
        clear = self.clear(x * (1 - mask), x, x)
        if self.interaction == "prose":
            fused = rainy * self.channel_weights(clear) + clear * self.pixel_weights(rainy)
        else:
            fused = clear * self.channel_weights(rainy) + rainy * self.pixel_weights(clear)
        out = self.fusion(x, fused, fused)
        return cast(Tensor, x + out if self.residual else out)

    def channel_weights(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b 1 1 c"]:
        """Return the weight of each channel in [0, 1], eq. 12."""
        weights = self.from_mean(x.mean((1, 2))) + self.from_max(x.amax((1, 2)))
        return cast(Tensor, weights.sigmoid()[:, None, None])

    def pixel_weights(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w 1"]:
        """Return the weight of each pixel in [0, 1], eq. 11; the paper does not say how the two maps become one."""
        pooled = torch.stack((x.mean(-1), x.amax(-1)), dim=-1)
        if self.weigh_pixels is None:
            return pooled.mean(-1, keepdim=True).sigmoid()
        return spatial(pooled, self.weigh_pixels).sigmoid()


def _bottleneck(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False))


class PlainCrossAttention(CrossAttention):
    """Residual cross-attention from features to themselves, without a mask; replaces MGCA in an ablation."""

    def forward(self, x: Float[Tensor, "b h w c"], mask: None = None) -> Float[Tensor, "b h w c"]:  # type: ignore[override]
        """Transform features."""
        return x + super().forward(x, x, x)


class CLIPRPN(nn.Module):
    """Restoration network of CLIP-RPN; the route of each image is an argument of ``forward``.

    Args:
        route_count: Number of routes, each with a sub-network at each of three levels; 0: a plain Restormer.
        mgca: Whether the sub-networks are mask-guided cross-attention, or plain cross-attention without masks.
        interaction: See `MaskGuidedCrossAttention`.
        residual: See `MaskGuidedCrossAttention`.
        spatial_kernel: See `MaskGuidedCrossAttention`.
        dim: Channels of Restormer at the finest level.
        blocks: Transformer blocks of the four levels.
        refinement: Transformer blocks at full resolution after the decoder.
        heads: Attention heads of the four levels.
        expansion: Ratio of hidden channels to input channels in the feed-forward networks.

    Shape:
        ``(b, 3, h, w)`` in [0, 1], any ``h, w >= 1`` → `Restored`.

    Raises:
        DerainError: If an argument is out of its range.

    References:
        CLIP-RPN, Figure 1. 32,720,308 parameters with two routes.
    """

    def __init__(
        self,
        route_count: int = 2,
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

        def subnetwork(level: int) -> nn.Module:
            channels = dim * 2**level
            if not mgca:
                return PlainCrossAttention(channels, heads[level])
            return MaskGuidedCrossAttention(channels, heads[level], interaction, residual, spatial_kernel)

        mask_levels = LEVELS if mgca and route_count else ()
        self.masks = nn.ModuleDict({str(level): MaskHead(dim * 2**level) for level in mask_levels})
        self.routes = nn.ModuleList(
            nn.ModuleDict({str(level): subnetwork(level) for level in LEVELS}) for _ in range(route_count)
        )

    def forward(self, rainy: Float[Tensor, "b 3 h w"], routes: Sequence[int] | None = None) -> Restored:
        """Restore images.

        Args:
            rainy: Rainy images in [0, 1].
            routes: Index of the route of each image, or a single index for all images; default: route 0.

        Raises:
            ValueError: If the number of indices is neither 1 nor that of the images, or a route does not exist.
        """
        logits: list[Tensor] = []
        image_routes = list(routes or [0])
        count = max(1, len(self.routes))
        if len(image_routes) not in {1, len(rainy)} or not set(image_routes) <= set(range(count)):
            raise ValueError(f"routes {image_routes}: expected 1 or {len(rainy)} indices from 0 to {count - 1}")

        def interact(level: int, x: Tensor) -> Tensor:
            mask = None
            if len(self.masks):
                logit = self.masks[str(level)](x)
                logits.append(logit.permute(0, 3, 1, 2))
                mask = logit.sigmoid()
            if not len(self.routes):
                return x
            return self._apply_routes(level, x, mask, image_routes)

        derained = self.backbone(rainy, interact)
        return Restored(derained, logits)

    def _apply_routes(self, level: int, x: Tensor, mask: Tensor | None, image_routes: Sequence[int]) -> Tensor:
        """Transform the features of each image by the sub-network of its route at a level."""
        used = sorted(set(image_routes))
        if len(used) == 1:
            return cast(Tensor, self._subnetwork(used[0], level)(x, mask))
        out = torch.empty_like(x)
        for route in used:
            taken_by = [index for index, image_route in enumerate(image_routes) if image_route == route]
            indices = torch.tensor(taken_by, device=x.device)
            route_mask = None if mask is None else mask[indices]
            transformed = self._subnetwork(route, level)(x[indices], route_mask)
            out = out.index_copy(0, indices, transformed.to(x.dtype))
        return out

    def _subnetwork(self, route: int, level: int) -> nn.Module:
        return cast(nn.ModuleDict, self.routes[route])[str(level)]


def mask_maps(logits: Sequence[Float[Tensor, "b 1 _ _"]], height: int, width: int) -> Float[Tensor, "b n h w"]:
    """Return the predicted rain masks in [0, 1], upscaled to the size of the image, the finest level first.

    Args:
        logits: Logits of the masks, the coarsest level first, as in `Restored`.
        height: Height of the image before padding, in pixels.
        width: Width of the image before padding, in pixels.
    """
    finest = logits[-1]
    size = (finest.shape[2] * 2, finest.shape[3] * 2)
    maps = [nn.functional.interpolate(level_logits.float().sigmoid(), size) for level_logits in reversed(logits)]
    return torch.cat(maps, dim=1)[:, :, :height, :width]
