"""Layer normalisation of networks whose published cost includes it."""

from typing import Any

from torch import Tensor, nn

OPERATIONS = 4
"""Operations of a normalised value with scale and shift, as the package thop counts them."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that `derain bench` counts: the authors use PyTorch's class, whose operations thop counts."""

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return thop's operations."""
        return OPERATIONS * output.numel(), 0
