"""The function of tensors that a method exports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

IMAGES = ("rainy", "state")
"""Inputs that are images of any size; others are vectors."""

TIME = 3.0
"""Time of the example inputs of a diffusion; any time gives the same graph."""


class Graph(nn.Module):
    """A function of tensors with named inputs, and what a file records of it.

    Args:
        method: The module whose parameters the function uses.
        function: Accepts the inputs in order and returns one image; by default ``method`` itself.
        inputs: Names of the inputs: ``rainy`` alone, or those of `derain.methods.interfaces.RunsGraph`, where ``rainy``
            and ``state`` are images, ``times`` is one number, others are vectors.
        context: Length of the vectors.
        metadata: What the file records beside inputs and parameters.
    """

    def __init__(
        self,
        method: nn.Module,
        function: Callable[..., Tensor] | None = None,
        inputs: Sequence[str] = ("rainy",),
        context: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.function = function
        self.inputs, self.context = list(inputs), context
        self.recorded = dict(metadata or {})

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return one image."""
        function = self.method if self.function is None else self.function
        return cast(Tensor, function(*inputs))

    def example(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Return inputs for one image of a size, the same for every call."""
        generator = torch.Generator().manual_seed(height * 10_000 + width)
        tensors = []
        for name in self.inputs:
            shape = (1, 3, height, width) if name in IMAGES else (1, self.context)
            random = torch.rand(shape, generator=generator)
            tensors.append(torch.tensor([TIME]) if name == "times" else random)
        return tuple(tensors)

    def metadata(self, parameters: int) -> dict[str, Any]:
        """Return what a file records of the graph."""
        return {"inputs": self.inputs, "parameters": parameters, **self.recorded}
