"""Deformable convolution against torchvision, and against loops over pixels."""

import math

import pytest
import torch

from derain.nn import deformable
from derain.nn.deformable import deformable_convolution


def inputs(batch, height, width, spread=2.0, side=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    taps = side * side
    x, offset = normal(batch, 2, height, width), spread * normal(batch, 2 * taps, height, width)
    return x, offset, normal(batch, taps, height, width).sigmoid(), normal(3, 2, side, side)


def sample(image, row, column):
    """Interpolate between four pixels; pixels outside the image are zero."""
    total = 0.0
    for y in (math.floor(row), math.floor(row) + 1):
        for x in (math.floor(column), math.floor(column) + 1):
            if 0 <= y < len(image) and 0 <= x < len(image[0]):
                total += (1 - abs(row - y)) * (1 - abs(column - x)) * image[y][x]
    return total


def test_it_equals_loops_over_pixels():
    x, offset, mask, weight = inputs(1, 4, 5)
    maps, expected = x[0].tolist(), torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    for row in range(4):
        for column in range(5):
            for tap in range(9):
                down, right = offset[0, 2 * tap : 2 * tap + 2, row, column].tolist()
                for channel in range(2):
                    value = sample(maps[channel], row + tap // 3 - 1 + down, column + tap % 3 - 1 + right)
                    factor = mask[0, tap, row, column] * value
                    expected[0, :, row, column] += weight[:, channel, tap // 3, tap % 3] * factor
    torch.testing.assert_close(deformable_convolution(x, offset, mask, weight), expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("side", [1, 3, 5])
def test_it_and_its_gradients_equal_torchvision(batch, side):
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = ([x.requires_grad_() for x in inputs(batch, 6, 7, side=side)] for _ in range(2))
    x, offset, mask, weight = theirs
    result = deformable_convolution(*ours)
    expected = torchvision.ops.deform_conv2d(x, offset, weight, padding=side // 2, mask=mask)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad)


@pytest.mark.parametrize("batch", [1, 2])
def test_strips_do_not_change_the_result(batch, monkeypatch):
    monkeypatch.setattr(deformable, "STRIP_BYTES", {"cpu": 1, "gpu": 1})
    arguments = inputs(batch, 5, 4)
    expected = deformable_convolution(*(x.requires_grad_() for x in arguments))
    with torch.no_grad():
        torch.testing.assert_close(deformable_convolution(*arguments), expected)


def test_positions_are_computed_in_float32():
    x, offset, mask, weight = (tensor.bfloat16() for tensor in inputs(1, 3, 600))
    expected = deformable_convolution(*(tensor.float() for tensor in (x, offset, mask, weight)))
    result = deformable_convolution(x, offset, mask, weight)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.1, rtol=0.02)
