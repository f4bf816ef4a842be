"""Convolutional LSTM and residual blocks for networks that refine an image in stages, such as PReNet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Maps = Sequence[Tensor | None]
"""Maps that are concatenated along the channels; all have the same shape, and None stands for zeros."""

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
"""Regular expressions of tensor names in the authors' files of PReNet, BRN and VRGNet, and their replacements.

The new names are those of `RecurrentStage`.
"""


class State(NamedTuple):
    """State of a convolutional LSTM.

    Attributes:
        hidden: Hidden state, ``(b, c, h, w)``.
        cell: Cell state, ``(b, c, h, w)``.
    """

    hidden: Tensor
    cell: Tensor


class Gates(NamedTuple):
    """Convolutions of the gates of an LSTM; each turns the concatenated input maps into ``(b, c, h, w)``.

    Attributes:
        input: Gate that scales the candidate.
        forget: Gate that scales the previous cell state.
        candidate: New content of the cell.
        output: Gate that scales the hidden state.
    """

    input: nn.Conv2d
    forget: nn.Conv2d
    candidate: nn.Conv2d
    output: nn.Conv2d


def lstm_step(gates: Gates, maps: Maps, cell: Float[Tensor, "b c h w"] | None) -> State:
    """Return the next state of a convolutional LSTM (Shi et al., NIPS 2015, without peepholes).

    Args:
        gates: Convolutions of the gates.
        maps: Inputs of the gates: features and hidden states. None stands for zeros, which are not convolved.
        cell: Previous cell state; None for zeros.
    """
    x = _concatenate([features for features in maps if features is not None])
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
    """Convolve ``x``, the concatenation of the maps that are not None, with their part of the weights."""
    weight = gate.weight
    if any(features is None for features in maps):
        parts = zip(weight.chunk(len(maps), dim=1), maps, strict=True)
        weight = _concatenate([part for part, features in parts if features is not None])
    return F.conv2d(x, weight, gate.bias, padding=gate.padding)


def _concatenate(maps: list[Tensor]) -> Tensor:
    """Concatenate along the channels; a single map is not copied."""
    return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)


class ResidualBlock(nn.Module):
    """Residual block: two 3×3 convolutions, each followed by a ReLU, and a ReLU after the sum, as in PReNet's code.

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
        """Apply the block."""
        branch = torch.relu_(self.second(torch.relu_(self.first(x))))
        return torch.relu_(branch + x)


class RecurrentStage(nn.Module):
    """Stage of a progressive network: a convolution with ReLU, a convolutional LSTM, residual blocks.

    Args:
        inputs: Channels i of the concatenated input images.
        channels: Channels c of the features.
        blocks: Number of residual blocks.
        memories: Number of hidden states that the gates read in addition to the features: first the stage's own, then
            those of other stages.

    Shape:
        Images ``(b, i, h, w)``, state with maps ``(b, c, h, w)`` → features ``(b, c, h, w)``, new state.

    References:
        Ren et al., Progressive Image Deraining Networks, CVPR 2019, Figure 2: f_in, f_recurrent and f_res.
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
        self, images: Float[Tensor, "b i h w"], state: State | None, hidden_states: Maps = ()
    ) -> tuple[Float[Tensor, "b c h w"], State]:
        """Return the features of the stage and its next state.

        Args:
            images: Images, concatenated along the channels.
            state: Previous state of this stage; None for zeros.
            hidden_states: Hidden states of other stages, ``memories - 1`` in number.
        """
        features = torch.relu_(self.head(images))
        gates = Gates(self.input_gate, self.forget_gate, self.candidate, self.output_gate)
        hidden, cell = (None, None) if state is None else state
        state = lstm_step(gates, (features, hidden, *hidden_states), cell)
        return self.blocks(state.hidden), state

    def extra_macs(self, inputs: tuple[Any, ...], output: tuple[Tensor, State]) -> tuple[int, int]:
        """Return MACs to add, see `DerainModule.pass_once`: those of the forget gate if there is no state, and 0."""
        if inputs[1] is not None:
            return 0, 0
        return self.forget_gate.weight.numel() * output[0][:, 0].numel(), 0


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3×3 convolution with zero padding, which keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
