"""Swin blocks for maps whose size varies.

Features are ``(b, h, w, c)``, so that the channels of a pixel are contiguous.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from derain.errors import DerainError
from derain.nn.graphs import exporting
from derain.nn.restormer import STRIP_BYTES

Features = Float[Tensor, "b h w c"]
"""Feature maps ``(b, h, w, c)``."""

MASKED = -100.0
"""Added to the attention score of two pixels that must not attend to each other."""

MAX_WINDOW = 32
"""Largest side of a window, in pixels."""


class WindowBlock(SwinTransformerBlock):
    """Swin block of timm for maps whose size varies: attention within windows, and an MLP.

    Attention masks are cached by size. Without gradients, the map is processed in strips of window rows, which limits
    memory.

    Args:
        channels: Number of channels.
        heads: Number of heads; must divide ``channels``.
        window: Side of the windows in pixels, 1 to 32.
        shifted: Whether the windows are shifted by half their side.
        expansion: Hidden channels of the MLP divided by ``channels``.
        drop_path: Probability that training skips the attention, or the MLP, for an image (stochastic depth).
        shift_single: Whether axes with only one window are shifted, too. Swin Transformers do not shift them.

    Shape:
        ``(b, h, w, channels)`` → same; ``h`` and ``w`` must be multiples of ``window``.

    Raises:
        DerainError: If ``heads`` does not divide ``channels``, or ``window`` is out of range.

    References:
        Liu et al., Swin Transformer, ICCV 2021, eq. 3.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        shifted: bool,
        *,
        expansion: float = 4.0,
        drop_path: float = 0.0,
        shift_single: bool = False,
    ) -> None:
        if channels % heads:
            raise DerainError(f"{heads} heads do not divide {channels} channels; choose a number of heads that does")
        if not 1 <= window <= MAX_WINDOW:  # the index of relative positions has window⁴ elements
            raise DerainError(f"window {window}: expected 1 to {MAX_WINDOW}; choose a side in this range")
        size = (window, window)
        super().__init__(channels, size, num_heads=heads, window_size=window, mlp_ratio=expansion, drop_path=drop_path)
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.shift_above = 0 if shift_single else window  # only axes longer than this are shifted

    def forward(self, x: Features) -> Features:
        """Apply the block."""
        if exporting():
            return transform_shifted(x, self.window, self.shift, self._transform, self.shift_above)
        height, width = x.shape[1:3]
        down = self.shift if height > self.shift_above else 0
        right = self.shift if width > self.shift_above else 0
        if down or right:
            x = torch.roll(x, (-down, -right), (1, 2))
        strip_rows = self._strip_rows(x)
        if strip_rows >= height:
            x = self._transform(x, self._mask(x, down, right))
        else:
            x = self._transform_strips(x, strip_rows, down, right)
        if down or right:
            x = torch.roll(x, (down, right), (1, 2))
        return x

    def _strip_rows(self, x: Features) -> int:
        """Return the number of rows of a strip; if gradients are enabled or the block is compiled, all rows."""
        batch, height, width, _ = x.shape
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return height
        budget = STRIP_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
        scores = batch * width * self.window**3 * self.attn.num_heads  # attention scores of one row of windows
        return max(1, budget // (scores * x.element_size())) * self.window

    def _transform_strips(self, x: Features, strip_rows: int, down: int, right: int) -> Features:
        """Transform a shifted map strip by strip; only the last strip contains rows from the opposite border."""
        height = x.shape[1]
        out = torch.empty_like(x)
        for top in range(0, height, strip_rows):
            strip = x[:, top : top + strip_rows]
            is_last = top + strip_rows >= height
            mask = self._mask(strip, down if is_last else 0, right)
            out[:, top : top + strip_rows] = self._transform(strip, mask)
        return out

    def _mask(self, strip: Features, down: int, right: int) -> Tensor | None:
        """Return the attention mask of a strip, or None if it has no pixels from the opposite border."""
        if not (down or right):
            return None
        _, height, width, _ = strip.shape
        cacheable = not torch.compiler.is_compiling() and not isinstance(strip, FakeTensor)
        build = shift_mask if cacheable else shift_mask.__wrapped__
        return build(height, width, self.window, down, right, strip.device)

    def _transform(self, x: Features, mask: Tensor | None) -> Features:
        """Apply attention within windows, then the MLP, each with pre-normalisation and a residual connection."""
        _, height, width, channels = x.shape
        windows = window_partition(self.norm1(x), self.window_size).flatten(1, 2)
        attended = self.attn(windows, mask=None if mask is None else mask.to(x.dtype))
        attended = attended.view(-1, self.window, self.window, channels)
        x = x + self.drop_path1(window_reverse(attended, self.window_size, height, width))
        return cast(Tensor, x + self.drop_path2(self.mlp(self.norm2(x))))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a cached mask may be used in training later
def shift_mask(
    height: int, width: int, side: int, down: int, right: int, device: torch.device
) -> Float[Tensor, "n k k"]:
    """Return the attention mask of a shifted map: -100 between pixels from opposite borders of the map, else 0.

    Args:
        height: Height of the map or strip, in pixels.
        width: Width of the map.
        side: Side of the windows.
        down: Number of rows at the bottom that come from the top of the map; 0 for all strips but the last.
        right: Number of columns at the right that come from the left of the map.
        device: Device of the mask.

    Returns:
        The mask ``(n, k, k)`` of n windows of ``k = side²`` pixels.

    Example:
        >>> shift_mask(2, 4, 2, 0, 1, torch.device("cpu"))[:, 0]
        tensor([[   0.,    0.,    0.,    0.],
                [   0., -100.,    0., -100.]])
    """
    row_regions = torch.zeros(height, dtype=torch.int64)
    column_regions = torch.zeros(width, dtype=torch.int64)
    row_regions[height - down :] = 1
    column_regions[width - right :] = 2
    return _region_mask(row_regions[:, None] + column_regions, side).to(device)


def transform_shifted(
    x: Features, side: int, shift: int, transform: Callable[[Tensor, Tensor | None], Tensor], above: int
) -> Features:
    """Shift a map, transform it and shift it back, without a branch that depends on the map's size.

    An exported graph must be valid for all sizes, so the graph itself computes whether an axis is shifted.

    Args:
        x: The map; height and width are multiples of ``side``.
        side: Side of the windows in pixels.
        shift: Number of pixels by which the map is shifted along each axis; 0 for none.
        transform: Function of the shifted map and its attention mask (None without a shift).
        above: Only axes longer than this, in pixels, are shifted.
    """
    if not shift:
        return transform(x, None)
    rows = torch.arange(x.shape[1], device=x.device)
    columns = torch.arange(x.shape[2], device=x.device)
    height = rows[-1] + 1  # a tensor, so that the graph computes it
    width = columns[-1] + 1
    down = shift * (height > above)
    right = shift * (width > above)
    regions = (rows + down >= height).int()[:, None] + 2 * (columns + right >= width).int()
    shifted = x[:, (rows + down) % height][:, :, (columns + right) % width]
    transformed = transform(shifted, _region_mask(regions, side))
    return transformed[:, (rows - down) % height][:, :, (columns - right) % width]


def _region_mask(regions: Int[Tensor, "h w"], side: int) -> Float[Tensor, "n k k"]:
    """Return the attention mask of windows: -100 between pixels from different regions of the map, else 0."""
    windows = window_partition(regions[None, :, :, None], (side, side)).flatten(1)
    return torch.where(windows[:, None] == windows[:, :, None], 0.0, MASKED)
