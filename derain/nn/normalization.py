"""Layer normalisation whose operations are counted, for networks whose published cost includes them."""

from typing import Any

from torch import Tensor, nn

OPERATIONS = 4
"""Operations per value that the package thop counts for a normalisation with scale and shift."""


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose operations ``derain bench`` counts.

    Networks use it where thop counts the normalisations of the authors' code, so that they are part of the published
    cost.
    """

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return what ``derain bench`` adds: the operations that thop counts; and no attention."""
        return OPERATIONS * output.numel(), 0
