import numpy as np
import pytest
import torch

from derain.nn.padding import pad_to_at_least, pad_to_multiple


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


@pytest.mark.parametrize("size", [(37, 31), (3, 20), (4, 1), (1, 1), (4, 4)])
def test_smallest_sides_equal_numpy(rng, size):
    image = rng.random((2, 3, *size))
    bottom, right = (max(0, 4 - side) for side in size)
    expected = np.pad(image, ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge")
    np.testing.assert_array_equal(pad_to_at_least(torch.from_numpy(image), 4).numpy(), expected)
