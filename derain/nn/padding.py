"""Images brought to sizes that a network can halve."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pad_to_multiple(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Adds rows below and columns at the right until both sides are multiples.

    They are reflections, or copies of the border where an image is smaller than ``multiple``.

    Example:
        >>> import torch
        >>> pad_to_multiple(torch.zeros(1, 3, 37, 1), 8).shape
        torch.Size([1, 3, 40, 8])
    """
    height, width = x.shape[2:]
    mode = "reflect" if min(height, width) >= multiple else "replicate"
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode)
