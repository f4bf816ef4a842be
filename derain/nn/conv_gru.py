"""Gated recurrent unit of 3×3 convolutions; its state is a feature map."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ConvGRU(nn.Module):
    """Convolutional gated recurrent unit.

    ``∗`` is a convolution with bias, ``σ`` the sigmoid, ``x`` the input and ``h`` the state::

        z = σ(W_z ∗ x + U_z ∗ h)          update gate
        r = σ(W_r ∗ x + U_r ∗ h)          reset gate
        n = tanh(W_n ∗ x + U_n ∗ (r h))   candidate
        h' = (1 − z) h + z n

    Without a state, the result is ``h' = z n`` with ``z = σ(W_z ∗ x)`` and ``n = tanh(W_n ∗ x)``. Unlike with a state
    of zeros, the biases of ``U`` are not added.

    Args:
        inputs: Channels of the input.
        channels: Channels of the state.
        dilation: Dilation of the convolutions ``W`` of the input.
        recurrent: Whether the unit can be called with a state; otherwise it has only ``W_z`` and ``W_n``.

    Shape:
        Input ``(b, inputs, h, w)``, state ``(b, channels, h, w)`` or None → new state ``(b, channels, h, w)``.

    References:
        Ballas et al., Delving Deeper into Convolutional Networks for Learning Video Representations, ICLR 2016.
    """

    def __init__(self, inputs: int, channels: int, dilation: int = 1, *, recurrent: bool = True) -> None:
        super().__init__()
        for gate in ("update", "reset", "candidate") if recurrent else ("update", "candidate"):
            convolution = nn.Conv2d(inputs, channels, 3, padding=dilation, dilation=dilation)
            self.add_module(f"{gate}_input", convolution)
            if recurrent:
                self.add_module(f"{gate}_state", nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "b i h w"], state: Float[Tensor, "b c h w"] | None) -> Float[Tensor, "b c h w"]:
        """Return the new state; ``state`` is None at the first step."""
        if state is None:
            return torch.sigmoid_(self._convolve("update_input", x)) * torch.tanh_(self._convolve("candidate_input", x))
        update = torch.sigmoid_(self._sum("update", x, state))
        reset = torch.sigmoid_(self._sum("reset", x, state))
        candidate = torch.tanh_(self._sum("candidate", x, reset * state))
        return torch.lerp(state, candidate, update)

    def _sum(self, gate: str, x: Tensor, state: Tensor) -> Tensor:
        return self._convolve(f"{gate}_input", x).add_(self._convolve(f"{gate}_state", state))

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, self.get_submodule(name)(x))
