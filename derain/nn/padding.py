"""Padding of images to sizes that a network can halve."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from derain.nn.graphs import exporting


def pad_to_multiple(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Pad images at the bottom and the right until height and width are multiples of a number.

    The padding is a reflection of the image, or repeats its border if a side is shorter than ``multiple``.

    Args:
        x: Images of any size.
        multiple: Divisor of the padded height and width.

    Example:
        >>> import torch
        >>> pad_to_multiple(torch.zeros(1, 3, 37, 1), 8).shape
        torch.Size([1, 3, 40, 8])
    """
    height, width = x.shape[2:]
    if exporting():
        last_row = torch.arange(height, device=x.device)[-1]
        last_column = torch.arange(width, device=x.device)[-1]
        reflect = torch.minimum(last_row, last_column) + 1 >= multiple
        rows = padded_indices(last_row, multiple, reflect)
        columns = padded_indices(last_column, multiple, reflect)
        return x[:, :, rows][..., columns]
    mode = "reflect" if min(height, width) >= multiple else "replicate"
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode)


def pad_to_at_least(x: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b c h2 w2"]:
    """Pad images that are too small at the bottom and the right, by repeating their border.

    Args:
        x: Images of any size.
        side: Smallest height and width.

    Example:
        >>> import torch
        >>> pad_to_at_least(torch.zeros(1, 3, 37, 1), 16).shape
        torch.Size([1, 3, 37, 16])
    """
    height, width = x.shape[2:]
    if exporting():
        return x[:, :, _continued(height, side, x.device)][..., _continued(width, side, x.device)]
    bottom, right = max(0, side - height), max(0, side - width)
    return F.pad(x, (0, right, 0, bottom), "replicate") if bottom or right else x


def _continued(length: int, smallest: int, device: torch.device) -> Int[Tensor, " n"]:
    """Return the indices 0 to ``length - 1``, the last of them repeated until there are ``smallest``."""
    if torch.compiler.is_exporting():
        count = torch.sym_max(length, smallest)  # type: ignore[no-untyped-call]
        return torch.arange(count, device=device).clamp(max=length - 1)
    indices = torch.arange(length, device=device)
    further = torch.arange(smallest, device=device)[length:]
    return torch.cat((indices, indices[-1:].expand_as(further)))


def padded_indices(last: Int[Tensor, ""], multiple: int, reflect: Tensor) -> Int[Tensor, " n"]:
    """Return the index of the row (or column) to copy for each row of a padded image.

    Computed from tensors, so that an exported graph is valid for images of any size.

    Args:
        last: Index of the image's last row.
        multiple: Divisor of the padded length.
        reflect: Whether padding is a reflection; otherwise the last row is repeated.

    Example:
        >>> padded_indices(torch.tensor(4), 8, torch.tensor(True))
        tensor([0, 1, 2, 3, 4, 3, 2, 1])
        >>> padded_indices(torch.tensor(4), 8, torch.tensor(False))
        tensor([0, 1, 2, 3, 4, 4, 4, 4])
    """
    blocks: Any = last // multiple + 1
    if torch.compiler.is_exporting():  # a symbolic number; the sizes of the graph are multiples of it
        blocks = blocks.item()
        torch._check(blocks >= 1)  # type: ignore[no-untyped-call]
    indices = torch.arange(blocks * multiple, device=last.device)
    reflected = last - (indices - last).abs()
    repeated = indices.clamp(max=last)
    return torch.where(reflect, reflected, repeated)
