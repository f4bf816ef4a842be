"""Blocks at several scales compared with their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from derain.nn.inner_scale import DenseConnection, ScaleFusion


@pytest.mark.parametrize("like", [None, (1, 2, 5, 4), (1, 2, 20, 23)])
def test_fusion_equals_a_convolution_of_the_concatenation(like):
    torch.manual_seed(0)
    maps = [torch.rand(1, channels, *size).double() for channels, size in ((2, (13, 11)), (3, (6, 5)), (1, (3, 2)))]
    fusion = ScaleFusion(6, 4).double()
    like = None if like is None else torch.zeros(like)
    size = (13, 11) if like is None else like.shape[2:]
    expected = fusion.mix(torch.cat([F.interpolate(x, size=size) for x in maps], dim=1))
    torch.testing.assert_close(fusion(maps, like), expected)


class Scale(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_dense_connection(grad, output):
    """Also without gradients, where results are stored side by side."""
    torch.manual_seed(0)
    dense = DenseConnection([Scale(2), Scale(3)], 4, output=output).double()
    x, *skips = torch.rand(3, 2, 4, 5, 6, dtype=torch.float64)
    first, *last = dense.transitions
    results = [2 * (x + skips[0])]
    y = F.leaky_relu(first(torch.cat([x, results[0]], dim=1)), 0.2)
    results.append(3 * (y + skips[1]))
    if output:
        y = F.leaky_relu(last[0](torch.cat([x, *results], dim=1)), 0.2)
    with torch.set_grad_enabled(grad):
        derived, stored = dense(x, skips)
    torch.testing.assert_close(stored, results)
    if output:
        torch.testing.assert_close(derived, y)


def test_repeated_blocks_have_one_weight():
    torch.manual_seed(0)
    dense = DenseConnection([nn.Conv2d(2, 2, 1)], 2, repeats=2)
    apart = DenseConnection([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)], 2)
    apart.load_state_dict(dense.state_dict() | {f"blocks.1.{k}": v for k, v in dense.blocks[0].state_dict().items()})
    x = torch.rand(1, 2, 3, 3)
    assert len(dense.blocks) == 1
    torch.testing.assert_close(dense(x), apart(x))
