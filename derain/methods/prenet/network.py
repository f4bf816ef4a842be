"""PReNet: a small network that is applied repeatedly to the rainy image and its own output."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import DerainError
from derain.nn.recurrent import Gates, State, lstm_step

Variant = Literal["PReNet", "PReNet_r", "PRN", "PRN_r", "PReNet_LSTM"]
"""Names of the network and its ablations in the paper and its code."""

VARIANTS: dict[Variant, dict[str, bool]] = {
    "PReNet": {"recurrent": True, "shared": False},
    "PReNet_r": {"recurrent": True, "shared": True},
    "PRN": {"recurrent": False, "shared": False},
    "PRN_r": {"recurrent": False, "shared": True},
    "PReNet_LSTM": {"recurrent": True, "shared": False, "residual": False},
}
"""Arguments of `PReNet` by variant."""

MAX_STAGES = 100
"""Largest number of stages. Without a limit, time would be unlimited too, since weights fit any number of stages."""


class PReNet(nn.Module):
    """Progressive recurrent network: the same small network restores the image in several stages.

    The inputs of a stage are the rainy image and the output of the stage before. Parameters have the names in the
    authors' files. Weights fit any number of stages. PReNet has 168,963 parameters, PReNet_r 94,979, PRN 95,107 and
    PRN_r 21,123.

    Args:
        stages: Number of stages, 1 to 100.
        recurrent: Whether a convolutional LSTM carries its state from stage to stage.
        shared: Whether one residual block is applied five times, instead of five blocks.
        residual: Whether the rainy image is added to the result of a stage. If not, as in the authors' ``PReNet_LSTM``,
            the result is the derained image; names and shapes of the parameters are the same.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → same, not clamped; any ``h, w >= 1``. An output pixel depends on input pixels up to
        ``13 * stages`` pixels away.

    Raises:
        DerainError: If there are fewer than 1 or more than `MAX_STAGES` stages.

    References:
        Ren et al., Progressive Image Deraining Networks: A Better and Simpler Baseline, CVPR 2019, eqs. 3 and 5.
        As in the authors' code, each residual branch ends with a ReLU.

    Example:
        >>> network = PReNet()
        >>> sum(parameter.numel() for parameter in network.parameters())
        168963
        >>> network(torch.rand(1, 3, 5, 7)).shape
        torch.Size([1, 3, 5, 7])
    """

    def __init__(self, stages: int = 6, *, recurrent: bool = True, shared: bool = False, residual: bool = True) -> None:
        super().__init__()
        if not 1 <= stages <= MAX_STAGES:
            raise DerainError(f"stages {stages}: expected 1 to {MAX_STAGES}")
        self.stages, self.recurrent, self.residual = stages, recurrent, residual
        self.conv0 = nn.Sequential(_conv(6, 32), nn.ReLU(inplace=True))
        if recurrent:
            self.conv_i = nn.Sequential(_conv(64, 32))
            self.conv_f = nn.Sequential(_conv(64, 32))
            self.conv_g = nn.Sequential(_conv(64, 32))
            self.conv_o = nn.Sequential(_conv(64, 32))
        names = [f"res_conv{number}" for number in range(1, 6)]
        for name in names[:1] if shared else names:
            layers = _conv(32, 32), nn.ReLU(inplace=True), _conv(32, 32), nn.ReLU(inplace=True)
            self.add_module(name, nn.Sequential(*layers))
        self.block_names = names[:1] * 5 if shared else names
        self.conv = nn.Sequential(_conv(32, 3))

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the output of the last stage."""
        return self.every_stage(rainy)[-1]

    def every_stage(self, rainy: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b 3 h w"]]:
        """Return the outputs of all stages, in order, not clamped."""
        outputs: list[Tensor] = []
        derained = rainy
        state = None
        for _ in range(self.stages):
            x = self.conv0(torch.cat((rainy, derained), dim=1))
            if self.recurrent:
                state = self._lstm(x, state)
                x = state.hidden
            for name in self.block_names:
                x = torch.relu_(x + self.get_submodule(name)(x))
            derained = self.conv(x)
            if self.residual:
                derained = derained + rainy
            outputs.append(derained)
        return outputs

    def extra_macs(self, inputs: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
        """Return two numbers of multiplications that ``derain bench`` adds, see `DerainModule.pass_once`.

        The first number counts the forget gate of the first stage, which the authors' code computes although there is
        no cell state to forget. The second number, for attention, is 0.
        """
        if not self.recurrent:
            return 0, 0
        pixels = output.numel() // output.shape[1]
        return self.get_parameter("conv_f.0.weight").numel() * pixels, 0

    def _lstm(self, x: Float[Tensor, "b 32 h w"], state: State | None) -> State:
        """Return the next state of the LSTM; a ``state`` of None stands for zeros."""
        gates = Gates(*(cast(nn.Conv2d, self.get_submodule(f"conv_{name}.0")) for name in "ifgo"))
        hidden, cell = (None, None) if state is None else state
        return lstm_step(gates, (x, hidden), cell)


def variant_of(state: Mapping[str, Tensor]) -> Variant | None:
    """Return the variant whose tensors have the names and shapes of a state dict, or None for another network.

    ``PReNet_LSTM`` is never returned, since its tensors have the names and shapes of ``PReNet``.

    Example:
        >>> variant_of(PReNet(shared=True).state_dict())
        'PReNet_r'
    """
    shapes = {name: value.shape for name, value in state.items()}
    for variant, arguments in VARIANTS.items():
        if shapes == {name: value.shape for name, value in PReNet(**arguments).state_dict().items()}:
            return variant
    return None


class PublishedNetwork(NamedTuple):
    """Network of a published file, according to the folder of the file.

    Attributes:
        variant: Variant of the network.
        stages: Number of stages.
    """

    variant: Variant
    stages: int


FOLDER = re.compile("(PReNet|PRN)([2-9])((?:_r)?)(_MSE|_LSTM|_RecSSIM)?")
"""Names of the authors' folders: network, number of stages, ``_r`` for a shared block, loss or ablation."""

RECDERAIN_FOLDER = re.compile("Rainy?(Heavy|Light)/PReNet")
"""Folders of BRN's authors (repository RecDerain), who trained PReNet with 6 stages."""


def published_network(path: Path) -> PublishedNetwork | None:
    """Return the variant and the number of stages that the folder of a published file implies; None for other folders.

    Folders are those of PReNet's authors and of RecDerain. PReNet's authors run the files of ``PReNet6_RecSSIM`` as
    ``PReNet_LSTM``. ``_MSE`` denotes another loss for the same network.

    Example:
        >>> published_network(Path("logs/Ablation/PReNet5_LSTM/net_latest.pth"))
        PublishedNetwork(variant='PReNet_LSTM', stages=5)
    """
    folder = path.resolve().parent
    if RECDERAIN_FOLDER.fullmatch(f"{folder.parent.name}/{folder.name}"):
        return PublishedNetwork("PReNet", 6)
    match = FOLDER.fullmatch(folder.name)
    if match is None:
        return None
    name, stages, shared, ablation = match.groups()
    variant = "PReNet_LSTM" if ablation in {"_LSTM", "_RecSSIM"} else f"{name}{shared}"
    return PublishedNetwork(cast(Variant, variant), int(stages))


def is_real_rain_network(path: Path) -> bool:
    """Return whether a file is from the authors' folder ``logs/real``, whose network has another order of layers.

    Example:
        >>> is_real_rain_network(Path("logs/real/PReNet1.pth"))
        True
    """
    file = path.resolve()
    return file.parent.name == "real" and file.name in {"PReNet1.pth", "PReNet2.pth"}


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
