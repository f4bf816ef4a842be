"""Windows of shifted maps: which of their pixels were neighbours before the shift."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from timm.models.swin_transformer import window_partition
from torch import Tensor


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be wanted in training too
def shift_mask(
    height: int, width: int, side: int, down: int, right: int, device: torch.device
) -> Float[Tensor, "n k k"]:
    """-100 between the pixels of a window that were no neighbours before a map was rolled, else 0.

    Args:
        height: Of a map, or of its last rows.
        width: Of the map.
        side: Of the windows.
        down: By how much the map was rolled; 0 if the rows are not its last ones.
        right: Likewise.
        device: Where it is wanted.

    Example:
        >>> shift_mask(2, 4, 2, 0, 1, torch.device("cpu"))[:, 0]
        tensor([[   0.,    0.,    0.,    0.],
                [   0., -100.,    0., -100.]])
    """
    rows, columns = torch.zeros(height, dtype=torch.int64), torch.zeros(width, dtype=torch.int64)
    rows[height - down :], columns[width - right :] = 1, 2
    regions = (rows[:, None] + columns)[None, :, :, None]
    windows = window_partition(regions, (side, side)).flatten(1)
    return torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0).to(device)


def at_any_size(
    x: Float[Tensor, "b h w c"], side: int, shift: int, transform: Callable[[Tensor, Tensor | None], Tensor]
) -> Float[Tensor, "b h w c"]:
    """Shifts a map, transforms it and shifts it back, without deciding anything by its size.

    An exported graph holds for all sizes: whether there are windows to shift, it computes.

    Args:
        x: The map; its sides are multiples of ``side``.
        side: Of the windows.
        shift: By how much sides of more than one window are shifted; 0 for none.
        transform: Takes the map and what keeps pixels apart that only the shift made neighbours.
    """
    if not shift:
        return transform(x, None)
    rows, columns = (torch.arange(length, device=x.device) for length in x.shape[1:3])
    height, width = (places[-1] + 1 for places in (rows, columns))  # tensors, as whatever follows from them
    down, right = (shift * (length > side) for length in (height, width))
    regions = (rows + down >= height).int()[:, None] + 2 * (columns + right >= width).int()
    windows = window_partition(regions[None, :, :, None], (side, side)).flatten(1)
    mask = torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0)
    x = transform(x[:, (rows + down) % height][:, :, (columns + right) % width], mask)
    return x[:, (rows - down) % height][:, :, (columns - right) % width]
