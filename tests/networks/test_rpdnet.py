"""RPDNet compared with recorded outputs of the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from derain.errors import DerainError
from derain.networks.rpdnet import RPDNet, ScaleSpace
from tests.networks.goldens import (
    Golden,
    authors_network,
    check_gradients,
    check_outputs,
    check_parameters,
    check_real_image,
    check_recognition,
    check_sizes,
    load,
)

SQUARES = np.array([[2, 1, 2], [1, 0, 1], [2, 1, 2]])
"""Squared distances to the centre of a kernel."""


@pytest.fixture(scope="module")
def golden():
    return Golden("rpdnet")


@pytest.fixture(scope="module")
def network(golden):
    """Return the network with the authors' kernels, whose rounding moves outputs by 3e-9."""
    network = RPDNet(**RPDNet.options_of(golden.shapes()))
    load(network, golden)
    first, kernels = authors_kernels()
    torch.testing.assert_close(network.scale_space.first_kernel, first, rtol=0, atol=1e-7)
    torch.testing.assert_close(network.scale_space.kernels, kernels, rtol=0, atol=1e-7)
    network.scale_space.first_kernel, network.scale_space.kernels = first, kernels
    return network


def authors_kernels():
    """Return the Gaussian kernels with the authors' rounding: of levels and kernels in float32."""
    step = 2 ** (1 / 3)
    sigmas = []
    for level in range(5):
        before = step ** np.float32(level) * 1.6
        sigmas.append(np.float64(np.sqrt((before * step) ** 2 - before**2)))
    return kernel(np.sqrt(1.6**2 - 0.5**2)), torch.stack([kernel(sigma) for sigma in sigmas])


def kernel(sigma):
    values = np.exp(-SQUARES / (2 * sigma**2)).astype(np.float32)
    values /= 2 * np.pi * sigma * sigma
    return torch.from_numpy(values / values.sum())


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={f"it{number}": f"derained{number}" for number in range(1, 6)})


def test_parameters(network, golden):
    check_parameters(network, golden)


def test_recognition(golden):
    check_recognition(RPDNet, "rpdnet")
    small = {
        name: tensor[tuple(slice({32: 8, 64: 16, 160: 40}.get(side, side)) for side in tensor.shape)]
        for name, tensor in golden.state().items()
        if not name.startswith(("body.scale_conv.2.", "body.up_conv.1.", "body.lstm.2."))
    }
    options = RPDNet.options_of(small)
    assert options == {"channels": 8, "scales": 2}
    RPDNet(**options).load_state_dict(RPDNet.translate(small))


def test_scale_space_is_differences_of_blurred_maps():
    space = ScaleSpace(2, 2).double()
    x = torch.rand(1, 2, 9, 14, dtype=torch.float64)
    first, second = space(x)
    assert first.shape == (1, 10, 9, 14)
    assert second.shape == (1, 10, 4, 7)

    def blur(maps, weights):
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
        height, width = maps.shape[1:]
        return sum(
            weights[row, column] * padded[:, row : row + height, column : column + width]
            for row in range(3)
            for column in range(3)
        )

    level = blur(x[0].numpy(), space.first_kernel.numpy())
    for index, weights in enumerate(space.kernels.numpy()):
        blurred = blur(level, weights)
        np.testing.assert_allclose(first[0, 2 * index : 2 * index + 2].numpy(), blurred - level, rtol=0, atol=1e-12)
        level = blurred


@pytest.mark.parametrize(("name", "warnings"), [("rain100l.pth", 0), ("rain1400.pth", 0), ("net_latest.pth", 1)])
def test_iterations_of_files(name, warnings, caplog):
    assert RPDNet.assume(Path(name), {}) == {"iterations": 6}
    assert len(caplog.records) == warnings


@pytest.mark.parametrize("iterations", [0, 101])
def test_number_of_iterations_is_limited(iterations):
    with pytest.raises(DerainError, match=f"iterations {iterations}"):
        RPDNet(iterations)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(RPDNet(iterations=2, channels=4))


REAL = {"matlab-y": (26.8931, 0.90429), "prenet": (26.8593, 0.90420)}


@pytest.mark.slow
def test_real_image():
    network = authors_network(RPDNet, "rpdnet/Rain100H/rain100h.pth")
    check_real_image(network, "Rain100H", 3, REAL)
