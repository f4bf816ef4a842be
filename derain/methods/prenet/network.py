"""PLACEHOLDER by the coordinator, to be replaced by the prenet helper."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Variant = Literal["PReNet", "PReNet_r", "PRN", "PRN_r"]
VARIANTS = {
    "PReNet": {"recurrent": True, "shared": False},
    "PReNet_r": {"recurrent": True, "shared": True},
    "PRN": {"recurrent": False, "shared": False},
    "PRN_r": {"recurrent": False, "shared": True},
}


def variant_of(state: Mapping[str, Tensor]) -> Variant | None:
    for name, options in VARIANTS.items():
        own = PReNet(1, **options).state_dict()
        if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state.items()}:
            return name
    return None


class PReNet(nn.Module):
    def __init__(self, stages: int = 6, recurrent: bool = True, shared: bool = False):
        super().__init__()
        self.stages, self.recurrent, self.shared = stages, recurrent, shared
        conv = lambda i, o: nn.Conv2d(i, o, 3, 1, 1)
        self.conv0 = nn.Sequential(conv(6, 32), nn.ReLU())
        for k in range(1, 2 if shared else 6):
            self.add_module(f"res_conv{k}", nn.Sequential(conv(32, 32), nn.ReLU(), conv(32, 32), nn.ReLU()))
        if recurrent:
            for g in "ifgo":
                self.add_module(f"conv_{g}", nn.Sequential(conv(64, 32), nn.Sigmoid()))
        self.conv = nn.Sequential(conv(32, 3))

    def forward(self, rainy):
        x = rainy
        h = c = rainy.new_zeros(rainy.shape[0], 32, *rainy.shape[2:])
        for _ in range(self.stages):
            x = self.conv0(torch.cat((rainy, x), 1))
            if self.recurrent:
                z = torch.cat((x, h), 1)
                i, f, o = (torch.sigmoid(getattr(self, f"conv_{g}")[0](z)) for g in "ifo")
                c = f * c + i * torch.tanh(self.conv_g[0](z))
                h = o * torch.tanh(c)
                x = h
            for k in range(5):
                r = getattr(self, f"res_conv{1 if self.shared else k + 1}")
                x = torch.relu(r(x) + x)
            x = self.conv(x) + rainy
        return x
