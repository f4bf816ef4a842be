import numpy as np
import pytest
import torch

from derain.nn.padding import pad_by_mirror, pad_to_minimum, pad_to_multiple, pad_with_zeros


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


@pytest.mark.parametrize("size", [(37, 31), (9, 8), (16, 24), (3, 20), (1, 1), (4, 5)])
def test_padding_by_mirror_equals_numpy(rng, size):
    image = rng.random((2, 3, *size))
    bottom, right = (8 - side % 8 for side in size)
    expected = np.pad(image, ((0, 0), (0, 0), (0, bottom), (0, right)), mode="symmetric")
    np.testing.assert_array_equal(pad_by_mirror(torch.from_numpy(image), 8).numpy(), expected)


@pytest.mark.parametrize("size", [(37, 31), (8, 16), (1, 1), (7, 20)])
def test_zero_padding_equals_numpy(rng, size):
    image = rng.random((2, 3, *size))
    bottom, right = (-side % 8 for side in size)
    expected = np.pad(image, ((0, 0), (0, 0), (0, bottom), (0, right)))
    np.testing.assert_array_equal(pad_with_zeros(torch.from_numpy(image), 8).numpy(), expected)


@pytest.mark.filterwarnings("ignore")
def test_zero_padding_of_a_traced_graph_is_that_of_any_size():
    traced = torch.jit.trace(lambda image: pad_with_zeros(image, 8), torch.rand(1, 3, 9, 12))
    for size in ((37, 31), (8, 16), (1, 1)):
        image = torch.rand(1, 3, *size)
        assert torch.equal(traced(image), pad_with_zeros(image, 8))
