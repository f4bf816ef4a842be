"""TransWeather compared with recorded outputs of the authors' code."""

import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.networks.transweather import QueryAttention, TransWeather
from tests.networks.goldens import (
    Golden,
    check_gradients,
    check_outputs,
    check_parameters,
    check_recognition,
    check_sizes,
    load,
    published_state,
)

TINY = {
    "widths": [8, 16, 8, 24],
    "depths": [1, 2, 1, 1],
    "reductions": [2, 2, 1, 1],
    "expansion": 3,
    "decoder_depth": 1,
    "decoder_expansion": 2,
    "queries": 5,
    "last": [6, 4],
}


@pytest.fixture(scope="module")
def golden():
    return Golden("transweather")


@pytest.fixture(scope="module")
def network(golden):
    network = TransWeather(**TransWeather.options_of(golden.shapes()))
    load(network, golden)
    return network


@pytest.mark.slow
def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


@pytest.mark.slow
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden)


@pytest.mark.slow
def test_parameters(network, golden):
    check_parameters(network, golden)


def test_recognition(golden):
    check_recognition(TransWeather, "transweather")
    state = published_state(TransWeather(**TINY), golden)
    assert TransWeather.options_of(state) == TINY
    TransWeather(**TINY).load_state_dict(TransWeather.translate(state), strict=True)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(TransWeather(**TINY))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 3)])
def test_queries_are_interpolated_to_the_pixels(size):
    """The authors interpolate queries to the pixels and compute all pixels; equal queries have equal results."""
    torch.manual_seed(0)
    attention = QueryAttention(8, heads=2, queries=5).double()
    x = torch.rand(2, *size, 8, dtype=torch.float64)
    pixels = size[0] * size[1]
    with torch.no_grad():
        query = attention.query(attention.queries).reshape(1, 5, 2, 4).transpose(1, 2)
        query = F.interpolate(query, size=(pixels, 4)).expand(2, -1, -1, -1)
        key, value = attention.key_value(x).reshape(2, pixels, 2, 2, 4).permute(2, 0, 3, 1, 4)
        similarity = (query @ key.transpose(2, 3)) / 2
        expected = attention.project((similarity.softmax(-1) @ value).transpose(1, 2).reshape(x.shape))
        torch.testing.assert_close(attention(x), expected)


def test_paths_are_skipped_in_training_only():
    torch.manual_seed(0)
    network = TransWeather(**TINY, drop=0.5)
    rainy = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert len({float(network(rainy).sum()) for _ in range(4)}) > 1
        network.eval()
        assert torch.equal(network(rainy), network(rainy))


def test_a_number_for_each_stage():
    with pytest.raises(DerainError, match=r"heads \[1, 2\]: expected 4"):
        TransWeather(heads=[1, 2])
