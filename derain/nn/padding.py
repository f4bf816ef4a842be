"""Images brought to sizes that a network can halve."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from derain.nn.graphs import recorded_for_all_sizes


def pad_to_multiple(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Adds rows below and columns at the right until both sides are multiples.

    They are reflections, or copies of the border where an image is smaller than ``multiple``.

    Example:
        >>> import torch
        >>> pad_to_multiple(torch.zeros(1, 3, 37, 1), 8).shape
        torch.Size([1, 3, 40, 8])
    """
    height, width = x.shape[2:]
    if recorded_for_all_sizes():
        last_row, last_column = (torch.arange(length, device=x.device)[-1] for length in (height, width))
        reflect = torch.minimum(last_row, last_column) + 1 >= multiple
        rows, columns = (places(last, multiple, reflect) for last in (last_row, last_column))
        return x[:, :, rows][..., columns]
    mode = "reflect" if min(height, width) >= multiple else "replicate"
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode)


def places(last: Int[Tensor, ""], multiple: int, reflect: Tensor) -> Int[Tensor, " n"]:
    """Which rows, or columns, a padded image has, computed from tensors and so for images of any size.

    Args:
        last: Place of the image's last row.
        multiple: Of which the result's length is one.
        reflect: Whether rows are added by reflection, else by copying the last one.

    Example:
        >>> places(torch.tensor(4), 8, torch.tensor(True))
        tensor([0, 1, 2, 3, 4, 3, 2, 1])
        >>> places(torch.tensor(4), 8, torch.tensor(False))
        tensor([0, 1, 2, 3, 4, 4, 4, 4])
    """
    blocks = last // multiple + 1
    if torch.compiler.is_exporting():  # a number without a value yet, of which all sizes in the graph are multiples
        blocks = blocks.item()
        torch._check(blocks >= 1)
    padded = torch.arange(blocks * multiple, device=last.device)
    return torch.where(reflect, last - (padded - last).abs(), padded.clamp(max=last))
