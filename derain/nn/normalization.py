"""Layer normalisation for networks whose published cost includes it."""

from typing import Any

from torch import Tensor, nn

OPERATIONS = 4
"""Operations per value that the package thop counts for a normalisation with scale and shift."""


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose operations `derain bench` counts, as thop does in networks that use PyTorch's class."""

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return the operations that thop counts, and no multiplications of attention."""
        return OPERATIONS * output.numel(), 0
