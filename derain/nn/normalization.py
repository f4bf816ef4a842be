"""Layer normalisation whose operations ``derain bench`` counts."""

from typing import Any

from torch import Tensor, nn

OPERATIONS = 4
"""Operations per value that the package thop counts for a normalisation with scale and shift."""


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose operations ``derain bench`` counts, for networks whose published MACs include them."""

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of the normalisation in thop, and 0."""
        return OPERATIONS * output.numel(), 0
