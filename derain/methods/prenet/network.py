"""PReNet: a small residual network that derains its own output stage after stage."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PReNet(nn.Module):
    """Progressive recurrent network of Ren et al.: the same weights restore the image once a stage.

    A stage sees the rainy image beside the previous stage's output, and adds what it finds to the rainy
    image. Parameter names and values are the authors', so their files load strictly:

    ========  ===============================  ==========
    name      arguments                        parameters
    ========  ===============================  ==========
    PReNet                                     168,963
    PReNet_r  ``shared=True``                  94,979
    PRN       ``recurrent=False``              95,107
    PRN_r     ``recurrent=False, shared=True`` 21,123
    ========  ===============================  ==========

    Args:
        stages: How often the image is restored, at least 1.
        recurrent: Carry a convolutional LSTM's state from stage to stage.
        shared: Use one residual block five times in place of five.
        features: Width of every hidden layer.

    Shape:
        ``(b, 3, h, w)`` in [0, 1] → the same, not clamped; any ``h, w >= 1``. One pixel of the output depends
        on the 14 ``stages`` pixels around it in each direction.

    References:
        Progressive Image Deraining Networks: A Better and Simpler Baseline, CVPR 2019, eq. 3 and 5, figure 3.
        As in the authors' code, and unlike figure 3, each residual branch ends in a ReLU of its own.

    Example:
        >>> network = PReNet()
        >>> sum(parameter.numel() for parameter in network.parameters())
        168963
        >>> network(torch.rand(1, 3, 5, 7)).shape
        torch.Size([1, 3, 5, 7])
    """

    def __init__(self, stages: int = 6, *, recurrent: bool = True, shared: bool = False, features: int = 32) -> None:
        super().__init__()
        self.stages = stages
        self.recurrent = recurrent
        self.conv0 = nn.Sequential(_conv(6, features), nn.ReLU(inplace=True))
        if recurrent:
            self.conv_i, self.conv_f, self.conv_g, self.conv_o = (
                nn.Sequential(_conv(2 * features, features)) for _ in range(4)
            )
        for number in range(1, 2 if shared else 6):
            branch = nn.Sequential(
                _conv(features, features), nn.ReLU(inplace=True), _conv(features, features), nn.ReLU(inplace=True)
            )
            self.add_module(f"res_conv{number}", branch)
        self.conv = nn.Sequential(_conv(features, 3))
        self._branches = [f"res_conv{1 if shared else number}" for number in range(1, 6)]

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Gives the last stage's output."""
        return self.every_stage(rainy)[-1]

    def every_stage(self, rainy: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b 3 h w"]]:
        """Gives each stage's output, the first stage first."""
        derained, cell, hidden = [rainy], None, None
        for _ in range(self.stages):
            x = self.conv0(torch.cat((rainy, derained[-1]), dim=1))
            if self.recurrent:
                x = hidden, cell = self._remember(x, hidden, cell)
            for branch in self._branches:
                x = torch.relu_(x + self.get_submodule(branch)(x))
            derained.append(rainy + self.conv(x))
        return derained[1:]
