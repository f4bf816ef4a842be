"""PReNet: a small residual network that restores its own output, stage after stage."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError

Variant = Literal["PReNet", "PReNet_r", "PRN", "PRN_r", "PReNet_LSTM"]
"""Names that the paper and its code give the network and its ablations."""

VARIANTS: dict[Variant, dict[str, bool]] = {
    "PReNet": {"recurrent": True, "shared": False},
    "PReNet_r": {"recurrent": True, "shared": True},
    "PRN": {"recurrent": False, "shared": False},
    "PRN_r": {"recurrent": False, "shared": True},
    "PReNet_LSTM": {"recurrent": True, "shared": False, "residual": False},
}
"""Arguments of `PReNet` by variant."""

MOST_STAGES = 100
"""Time grows with the stages, and no parameter of a file bounds them; the authors' networks have 2 to 7."""


class PReNet(nn.Module):
    """Progressive recurrent network: one small network restores the image once a stage.

    A stage sees the rainy image beside the previous stage's output, and adds what it finds to the rainy
    image. Parameters are named as the authors name them, so that their files load strictly. The number of
    stages is no parameter: weights fit any. There are 168,963 parameters in PReNet, 94,979 in PReNet_r,
    95,107 in PRN and 21,123 in PRN_r.

    Args:
        stages: How often the image is restored, at least 1.
        recurrent: A convolutional LSTM carries its state from stage to stage.
        shared: One residual block is applied five times in place of five blocks.
        residual: A stage adds its output to the rainy image; else its output is the image, as in the authors'
            ``PReNet_LSTM``, whose parameters have the same names and shapes.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → the same, not clamped; any ``h, w >= 1``. A pixel depends on the pixels
        up to ``13 * stages`` away.

    Raises:
        DerainError: If there is no stage, or more than `MOST_STAGES`.

    References:
        Ren et al., Progressive Image Deraining Networks: A Better and Simpler Baseline, CVPR 2019, eq. 3 and 5.
        As in the authors' code, each residual branch ends in a ReLU of its own.

    Example:
        >>> network = PReNet()
        >>> sum(parameter.numel() for parameter in network.parameters())
        168963
        >>> network(torch.rand(1, 3, 5, 7)).shape
        torch.Size([1, 3, 5, 7])
    """

    def __init__(self, stages: int = 6, *, recurrent: bool = True, shared: bool = False, residual: bool = True) -> None:
        super().__init__()
        if not 1 <= stages <= MOST_STAGES:
            raise DerainError(f"stages {stages}: PReNet has 1 to {MOST_STAGES}; give fewer or more")
        self.stages, self.recurrent, self.residual = stages, recurrent, residual
        self.conv0 = nn.Sequential(_conv(6, 32), nn.ReLU(inplace=True))
        if recurrent:
            self.conv_i, self.conv_f, self.conv_g, self.conv_o = (nn.Sequential(_conv(64, 32)) for _ in range(4))
        self.branches = [f"res_conv{1 if shared else number}" for number in range(1, 6)]
        for name in dict.fromkeys(self.branches):
            layers = _conv(32, 32), nn.ReLU(inplace=True), _conv(32, 32), nn.ReLU(inplace=True)
            self.add_module(name, nn.Sequential(*layers))
        self.conv = nn.Sequential(_conv(32, 3))

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Gives the last stage's output."""
        return self.every_stage(rainy)[-1]

    def every_stage(self, rainy: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b 3 h w"]]:
        """Gives the output of every stage, the last one last."""
        derained, hidden, cell = [rainy], None, None
        for _ in range(self.stages):
            x = self.conv0(torch.cat((rainy, derained[-1]), dim=1))
            if self.recurrent:
                if hidden is None or cell is None:  # the first state is zero and adds nothing
                    cell = self._gate("i", x) * self._gate("g", x)
                else:
                    x = torch.cat((x, hidden), dim=1)
                    cell = self._gate("f", x) * cell
                    cell = torch.addcmul(cell, self._gate("i", x), self._gate("g", x))
                x = hidden = self._gate("o", x) * torch.tanh(cell)
            for name in self.branches:
                x = torch.relu_(x + self.get_submodule(name)(x))
            derained.append(self.conv(x) + rainy if self.residual else self.conv(x))
        return derained[1:]

    def _gate(self, name: str, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 32 h w"]:
        """One gate of the LSTM, from features and hidden state (c = 64) or, in the first stage, features alone.

        The gates stay four convolutions: the quarters of one large result lie apart in memory, and reading
        them costs a CPU more than the larger convolution saves.
        """
        weight, bias = self.get_submodule(f"conv_{name}").parameters()
        gate = F.conv2d(x, weight[:, : x.shape[1]], bias, padding=1)
        return torch.tanh_(gate) if name == "g" else torch.sigmoid_(gate)


def variant_of(state: Mapping[str, Tensor]) -> Variant | None:
    """Return the variant of a state dict by names and shapes, or None if it is another network's.

    ``PReNet_LSTM`` has the names and shapes of ``PReNet`` and is never returned.

    Example:
        >>> variant_of(PReNet(shared=True).state_dict())
        'PReNet_r'
    """
    shapes = {name: value.shape for name, value in state.items()}
    for variant, parts in VARIANTS.items():
        if shapes == {name: value.shape for name, value in PReNet(**parts).state_dict().items()}:
            return variant
    return None


class Published(NamedTuple):
    """Network of an authors' file, as the name of its folder says.

    Attributes:
        variant: The network.
        stages: Number of stages.
    """

    variant: Variant
    stages: int


FOLDER = re.compile("(PReNet|PRN)([2-9])((?:_r)?)(_MSE|_LSTM|_RecSSIM)?")
"""Folders of the authors' files: network, stages, one block for five, loss or ablation."""


def published_network(path: Path) -> Published | None:
    """Return variant and number of stages that the folder of an authors' file names, or None if it names none.

    The authors' test script runs the files of ``PReNet6_RecSSIM`` as ``PReNet_LSTM``; ``_MSE`` is another loss of the
    same network.

    Example:
        >>> published_network(Path("logs/Ablation/PReNet5_LSTM/net_latest.pth"))
        Published(variant='PReNet_LSTM', stages=5)
    """
    found = FOLDER.fullmatch(path.resolve().parent.name)
    if found is None:
        return None
    name, stages, shared, ablation = found.groups()
    variant = "PReNet_LSTM" if ablation in {"_LSTM", "_RecSSIM"} else f"{name}{shared}"
    return Published(cast(Variant, variant), int(stages))


def is_real_rain_generator(path: Path) -> bool:
    """Whether a file is of the authors' folder ``logs/real``: its LSTM comes after the residual blocks.

    Example:
        >>> is_real_rain_generator(Path("logs/real/PReNet1.pth"))
        True
    """
    file = path.resolve()
    return file.parent.name == "real" and file.name in {"PReNet1.pth", "PReNet2.pth"}


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
