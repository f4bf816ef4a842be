import numpy as np
import pytest
import torch

from derain.nn.padding import pad_to_minimum, pad_to_multiple


@pytest.mark.parametrize(
    ("size", "multiple", "mode"),
    [
        ((37, 31), 8, "reflect"),
        ((9, 8), 8, "reflect"),
        ((16, 24), 8, "reflect"),
        ((7, 20), 8, "edge"),
        ((1, 1), 8, "edge"),
        ((5, 4), 4, "reflect"),
    ],
)
def test_padding_equals_numpy(rng, size, multiple, mode):
    image = rng.random((2, 3, *size))
    bottom, right = (-side % multiple for side in size)
    expected = np.pad(image, ((0, 0), (0, 0), (0, bottom), (0, right)), mode=mode)
    padded = pad_to_multiple(torch.from_numpy(image), multiple).numpy()
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    np.testing.assert_array_equal(padded, expected)


@pytest.mark.parametrize("size", [(37, 31), (1, 1), (8, 3), (8, 8)])
def test_padding_to_a_minimum_equals_numpy(rng, size):
    image = rng.random((2, 3, *size))
    bottom, right = (max(8 - side, 0) for side in size)
    expected = np.pad(image, ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge")
    np.testing.assert_array_equal(pad_to_minimum(torch.from_numpy(image), 8).numpy(), expected)
