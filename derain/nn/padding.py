"""Padding of images at the bottom and the right to sizes that a network accepts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from derain.nn.graphs import exporting


def pad_to_multiple(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Pad images until height and width are multiples of a number.

    The padding reflects the image without repeating its border. If height or width is less than ``multiple``, the
    border is replicated along both axes instead.

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


def pad_to_minimum(x: Float[Tensor, "b c h w"], minimum: int) -> Float[Tensor, "b c h2 w2"]:
    """Pad images by replicating the border until both sides have a minimum length.

    Args:
        x: Images of any size.
        minimum: Minimum height and width in pixels.

    Example:
        >>> import torch
        >>> pad_to_minimum(torch.zeros(1, 3, 37, 1), 8).shape
        torch.Size([1, 3, 37, 8])
    """
    if exporting():
        rows, columns = (_indices_to_minimum(torch.arange(side, device=x.device), minimum) for side in x.shape[2:])
        return x[:, :, rows][..., columns]
    height, width = x.shape[2:]
    return F.pad(x, (0, max(minimum - width, 0), 0, max(minimum - height, 0)), "replicate")


def _indices_to_minimum(indices: Int[Tensor, " n"], minimum: int) -> Int[Tensor, " m"]:
    """Repeat the last index until there are ``minimum`` indices; an exported graph is valid for any size."""
    length: Any = (indices[-1] + 1).clamp(min=minimum)
    if torch.compiler.is_exporting():  # a symbolic integer; Python's max() would limit the graph to larger sizes
        length = length.item()
        torch._check(length >= minimum)  # type: ignore[no-untyped-call]
    return torch.arange(length, device=indices.device).clamp(max=indices[-1])


def pad_with_zeros(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Pad images with zeros until height and width are multiples of a number.

    Args:
        x: Images of any size.
        multiple: Divisor of the padded height and width.

    Example:
        >>> import torch
        >>> pad_with_zeros(torch.ones(1, 1, 2, 1), 3)[0, 0]
        tensor([[1., 0., 0.],
                [1., 0., 0.],
                [0., 0., 0.]])
    """
    height, width = x.shape[2:]
    if exporting():
        padded = pad_to_multiple(x, multiple)
        rows, columns = (torch.arange(length, device=x.device) for length in padded.shape[2:])
        return padded * ((rows < height)[:, None] & (columns < width))
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


def pad_by_mirror(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Pad images by their mirror image, border included, to the next greater multiple of a number.

    A side that is already a multiple grows by ``multiple`` pixels. A side shorter than its padding is mirrored again.

    Args:
        x: Images of any size.
        multiple: Divisor of the padded height and width.

    Example:
        >>> pad_by_mirror(torch.arange(3.0).reshape(1, 1, 1, 3), 4)
        tensor([[[[0., 1., 2., 2.],
                  [0., 1., 2., 2.],
                  [0., 1., 2., 2.],
                  [0., 1., 2., 2.]]]])
    """
    rows, columns = (_mirrored_indices(torch.arange(side, device=x.device), multiple) for side in x.shape[2:])
    return x[:, :, rows][..., columns]


def _mirrored_indices(inside: Int[Tensor, " n"], multiple: int) -> Int[Tensor, " m"]:
    """Return, for each row (or column) of a padded image, the row to copy; ``inside`` are the rows of the image."""
    length: Any = inside[-1] + 1 if exporting() else len(inside)  # a graph must compute the length
    blocks: Any = length // multiple + 1
    if torch.compiler.is_exporting():  # a symbolic integer: the exporter then knows that the side is a multiple
        blocks = blocks.item()
        torch._check(blocks >= 1)  # type: ignore[no-untyped-call]
    indices = torch.arange(blocks * multiple, device=inside.device) % (2 * length)
    return torch.minimum(indices, 2 * length - 1 - indices)


def padded_indices(last: Int[Tensor, ""], multiple: int, reflect: Tensor) -> Int[Tensor, " n"]:
    """Return, for each row (or column) of a padded image, the row to copy.

    ``last`` and ``reflect`` are tensors, so an exported graph is valid for images of any size.

    Args:
        last: Index of the image's last row.
        multiple: Divisor of the padded length.
        reflect: Whether padding reflects the image, bool ``()``; otherwise it replicates the last row.

    Example:
        >>> padded_indices(torch.tensor(4), 8, torch.tensor(True))
        tensor([0, 1, 2, 3, 4, 3, 2, 1])
        >>> padded_indices(torch.tensor(4), 8, torch.tensor(False))
        tensor([0, 1, 2, 3, 4, 4, 4, 4])
    """
    blocks: Any = last // multiple + 1
    if torch.compiler.is_exporting():  # a symbolic integer: the exporter then knows that the side is a multiple
        blocks = blocks.item()
        torch._check(blocks >= 1)  # type: ignore[no-untyped-call]
    indices = torch.arange(blocks * multiple, device=last.device)
    reflected = last - (indices - last).abs()
    repeated = indices.clamp(max=last)
    return torch.where(reflect, reflected, repeated)
