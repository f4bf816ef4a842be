"""Function of tensors that `derain export` writes to a file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

IMAGES = ("rainy", "state")
"""Names of the inputs that are images, ``(1, 3, h, w)`` of any size."""

TIME = 3.0
"""Value of ``times`` in example inputs, in steps of the diffusion's schedule. The graph is valid for any time."""


class Graph(nn.Module):
    """Function of tensors with named inputs, and its metadata.

    Args:
        method: Module whose parameters the function uses.
        function: Function that receives the inputs in order and returns ``(1, 3, h, w)``; by default ``method`` itself.
        inputs: Names of the inputs: ``rainy`` alone, or those of `derain.methods.interfaces.RunsGraph`. ``rainy`` and
            ``state`` are images, ``times`` is ``(1,)``, all others are vectors ``(1, context)``.
        context: Length of the vectors; ignored if there are none.
        metadata: Metadata of the graph in addition to the inputs and the number of parameters.
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
        self.extra_metadata = dict(metadata or {})

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the result of the function, ``(1, 3, h, w)``."""
        function = self.method if self.function is None else self.function
        return cast(Tensor, function(*inputs))

    def example(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Return random inputs for an image size in pixels, the same on every call; ``times`` is `TIME`."""
        generator = torch.Generator().manual_seed(height * 10_000 + width)
        tensors = []
        for name in self.inputs:
            if name == "times":
                tensors.append(torch.tensor([TIME]))
            else:
                shape = (1, 3, height, width) if name in IMAGES else (1, self.context)
                tensors.append(torch.rand(shape, generator=generator))
        return tuple(tensors)

    def metadata(self, parameters: int) -> dict[str, Any]:
        """Return the entry ``graph`` of a file's metadata.

        Args:
            parameters: Number of parameters of the network.
        """
        return {"inputs": self.inputs, "parameters": parameters, **self.extra_metadata}
