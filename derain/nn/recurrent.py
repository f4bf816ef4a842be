"""Convolutional LSTM and residual blocks of networks that refine an image in stages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Maps = Sequence[Tensor | None]
"""Maps of equally many channels side by side; None is a map of zeros."""


STAGE_NAMES: tuple[tuple[str, str], ...] = (
    (r"\bconv0\.0\.", "head."),
    (r"\bconv_i\.0\.", "input_gate."),
    (r"\bconv_f\.0\.", "forget_gate."),
    (r"\bconv_g\.0\.", "candidate."),
    (r"\bconv_o\.0\.", "output_gate."),
    *((rf"\bres_conv{number + 1}\.", f"blocks.{number}.") for number in range(5)),
    (r"\b(blocks\.\d)\.0\.", r"\1.first."),
    (r"\b(blocks\.\d)\.2\.", r"\1.second."),
)
"""Regular expressions of the names that PReNet, BRN and VRGNet give to the tensors of a `RecurrentStage`, and ours."""


class State(NamedTuple):
    """State of a convolutional LSTM.

    Attributes:
        hidden: ``(b, c, h, w)``.
        cell: ``(b, c, h, w)``.
    """

    hidden: Tensor
    cell: Tensor


class Gates(NamedTuple):
    """Convolutions of the gates of an LSTM; each reads all maps side by side and returns ``(b, c, h, w)``.

    The gates are four convolutions: reading the quarters of one large result, which are not contiguous, costs a CPU
    more time than the larger convolution saves.

    Attributes:
        input: How much of the candidate enters the cell.
        forget: How much of the cell remains.
        candidate: New content of the cell.
        output: How much of the cell becomes visible.
    """

    input: nn.Conv2d
    forget: nn.Conv2d
    candidate: nn.Conv2d
    output: nn.Conv2d


def lstm_step(gates: Gates, maps: Maps, cell: Float[Tensor, "b c h w"] | None) -> State:
    """Return the next state of a convolutional LSTM (Shi et al., NeurIPS 2015, without peepholes).

    Args:
        gates: Convolutions of the gates.
        maps: What the gates read: features and hidden states. Zeros are not convolved.
        cell: Last state of the cell; None for zeros.
    """
    x = _side_by_side([features for features in maps if features is not None])
    candidate = torch.tanh_(_convolve(gates.candidate, x, maps))
    if cell is None:
        cell = _sigmoid(gates.input, x, maps) * candidate
    else:
        remaining = _sigmoid(gates.forget, x, maps) * cell
        cell = torch.addcmul(remaining, _sigmoid(gates.input, x, maps), candidate)
    return State(_sigmoid(gates.output, x, maps) * torch.tanh(cell), cell)


def _sigmoid(gate: nn.Conv2d, x: Float[Tensor, "b c h w"], maps: Maps) -> Float[Tensor, "b d h w"]:
    return torch.sigmoid_(_convolve(gate, x, maps))


def _convolve(gate: nn.Conv2d, x: Float[Tensor, "b c h w"], maps: Maps) -> Float[Tensor, "b d h w"]:
    """Convolve the maps that are not zero by their part of the weights."""
    weight = gate.weight
    if any(features is None for features in maps):
        parts = zip(weight.chunk(len(maps), dim=1), maps, strict=True)
        weight = _side_by_side([part for part, features in parts if features is not None])
    return F.conv2d(x, weight, gate.bias, padding=gate.padding)


def _side_by_side(maps: list[Tensor]) -> Tensor:
    """Concatenate along the channels without copying a single map."""
    return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each followed by a ReLU, and a ReLU after the sum (PReNet, section 3.3).

    Args:
        channels: Channels c of the features.

    Shape:
        ``(b, c, h, w)`` → same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv3x3(channels, channels)
        self.second = conv3x3(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the features after the block."""
        branch = torch.relu_(self.second(torch.relu_(self.first(x))))
        return torch.relu_(branch + x)


class RecurrentStage(nn.Module):
    """Stage of a progressive network: a convolution with ReLU, a convolutional LSTM, residual blocks.

    Args:
        inputs: Channels i of the images that the stage reads.
        channels: Channels c of the features.
        blocks: Number of residual blocks.
        memories: Number of hidden states that the gates read after the features: the stage's own, then those of others.

    Shape:
        ``(b, i, h, w)`` → ``(b, c, h, w)``.

    References:
        Ren et al., Progressive Image Deraining Networks, CVPR 2019, eq. 5 and Figure 3: f_in, f_recurrent, f_res.
    """

    def __init__(self, inputs: int, channels: int, blocks: int, memories: int = 1) -> None:
        super().__init__()
        self.head = conv3x3(inputs, channels)
        width = channels * (1 + memories)
        self.input_gate = conv3x3(width, channels)
        self.forget_gate = conv3x3(width, channels)
        self.candidate = conv3x3(width, channels)
        self.output_gate = conv3x3(width, channels)
        self.blocks = nn.Sequential(*[ResidualBlock(channels) for _ in range(blocks)])

    def forward(
        self, images: Float[Tensor, "b i h w"], state: State | None, others: Maps = ()
    ) -> tuple[Float[Tensor, "b c h w"], State]:
        """Return the features of the stage, and its next state.

        Args:
            images: Images side by side.
            state: The stage's own last state; None for zeros.
            others: Hidden states of others.
        """
        features = torch.relu_(self.head(images))
        gates = Gates(self.input_gate, self.forget_gate, self.candidate, self.output_gate)
        hidden, cell = (None, None) if state is None else state
        state = lstm_step(gates, (features, hidden, *others), cell)
        return self.blocks(state.hidden), state

    def extra_macs(self, inputs: tuple[Any, ...], output: tuple[Tensor, State]) -> tuple[int, int]:
        """Return the multiplications that ``derain bench`` adds: of a forget gate without a state, and of attention."""
        if inputs[1] is not None:
            return 0, 0
        return self.forget_gate.weight.numel() * output[0][:, 0].numel(), 0


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3×3 convolution that keeps the size, with zeros around the maps."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
