"""Shifted windows of Swin blocks: attention masks, and a shift that works at any size of an exported graph."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from timm.models.swin_transformer import window_partition
from torch import Tensor

MASKED = -100.0
"""Added to the attention score of two pixels that must not attend to each other."""


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a cached mask may be used in training later
def shift_mask(
    height: int, width: int, side: int, down: int, right: int, device: torch.device
) -> Float[Tensor, "n k k"]:
    """Return the attention mask of a rolled map: -100 between pixels that were no neighbours before, else 0.

    Args:
        height: Height of the map, or of its last rows.
        width: Width of the map.
        side: Side of the windows.
        down: Rows by which the map was rolled; 0 if the rows are not its last ones.
        right: Columns by which the map was rolled.
        device: Device of the mask.

    Returns:
        ``(windows, side², side²)``.

    Example:
        >>> shift_mask(2, 4, 2, 0, 1, torch.device("cpu"))[:, 0]
        tensor([[   0.,    0.,    0.,    0.],
                [   0., -100.,    0., -100.]])
    """
    rows = torch.zeros(height, dtype=torch.int64)
    columns = torch.zeros(width, dtype=torch.int64)
    rows[height - down :] = 1
    columns[width - right :] = 2
    return _mask(rows[:, None] + columns, side).to(device)


def transform_shifted(
    x: Float[Tensor, "b h w c"], side: int, shift: int, transform: Callable[[Tensor, Tensor | None], Tensor]
) -> Float[Tensor, "b h w c"]:
    """Shift a map, transform it and shift it back, with no branch that depends on its size.

    An exported graph must hold for all sizes, so whether there are windows to shift is computed by the graph.

    Args:
        x: The map; height and width are multiples of ``side``.
        side: Side of the windows.
        shift: Pixels by which a map of more than one window is shifted; 0 for none.
        transform: Function of the map and the attention mask.
    """
    if not shift:
        return transform(x, None)
    rows = torch.arange(x.shape[1], device=x.device)
    columns = torch.arange(x.shape[2], device=x.device)
    height = rows[-1] + 1  # tensors rather than numbers: the graph computes what follows from them
    width = columns[-1] + 1
    down = shift * (height > side)
    right = shift * (width > side)
    regions = (rows + down >= height).int()[:, None] + 2 * (columns + right >= width).int()
    shifted = x[:, (rows + down) % height][:, :, (columns + right) % width]
    transformed = transform(shifted, _mask(regions, side))
    return transformed[:, (rows - down) % height][:, :, (columns - right) % width]


def _mask(regions: Int[Tensor, "h w"], side: int) -> Float[Tensor, "n k k"]:
    """Mask pairs of pixels in a window that come from different regions of the map."""
    windows = window_partition(regions[None, :, :, None], (side, side)).flatten(1)
    return torch.where(windows[:, None] == windows[:, :, None], 0.0, MASKED)
