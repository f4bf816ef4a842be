"""NLEDN compared with recorded outputs of the authors' code, and with their weights on real images."""

import math

import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.networks.nledn import NLEDN, NonLocal, unpool
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
    published_state,
)

TINY = {"channels": 8, "growth": 4, "convolutions": 2, "inner": 3}
SCORES = {"matlab-y": (34.8869, 0.93104), "prenet": (34.8919, 0.93101)}


@pytest.fixture(scope="module")
def golden():
    return Golden("nledn")


@pytest.fixture(scope="module")
def network(golden):
    network = NLEDN(**NLEDN.options_of(golden.shapes()))
    load(network, golden)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={"rain": "rain"})


def test_parameters(network, golden):
    check_parameters(network, golden)


@pytest.mark.slow
def test_authors_weights_restore_as_their_code():
    network = authors_network(NLEDN, "nledn/Rain100H/net_Rain100H.pth")
    check_real_image(network, "Rain100H", 17, SCORES)


def test_recognition(golden):
    check_recognition(NLEDN, "nledn")
    state = published_state(NLEDN(**TINY), golden)
    assert NLEDN.options_of(state) == TINY
    NLEDN(**TINY).load_state_dict(NLEDN.translate(state), strict=True)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(NLEDN(**TINY))


def test_output_is_the_image_minus_rain():
    torch.manual_seed(0)
    network = NLEDN(**TINY)
    rainy, clean = torch.rand(2, 1, 3, 20, 17)
    outputs = network.outputs(rainy)
    assert list(outputs) == ["derained", "rain"]
    assert torch.equal(outputs["derained"], rainy - outputs["rain"])
    targets = network.targets(rainy, clean, outputs)
    assert torch.equal(targets["derained"], clean)
    assert torch.equal(targets["rain"], rainy - clean)


def literal(block, x, grid):
    """Attend within pieces one by one, as `torch.chunk` splits the map."""
    rows = []
    for strip in x.chunk(grid, dim=2):
        pieces = []
        for piece in strip.chunk(grid, dim=3):
            query = block.query(piece).flatten(2)
            key, value = (F.max_pool2d(part(piece), 2).flatten(2) for part in (block.key, block.value))
            attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
            attended = (attention @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, piece.shape[2:])
            pieces.append(block.project(attended) + piece)
        rows.append(torch.cat(pieces, dim=3))
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("size", [(24, 32), (23, 31), (61, 35), (17, 26)])
@pytest.mark.parametrize("grid", [1, 2, 4, 8])
def test_attention_within_pieces(grid, size):
    torch.manual_seed(0)
    block = NonLocal(6, 3, grid).double()
    assert min(side % math.ceil(side / grid) or 2 for side in size) >= 2  # the literal form needs two pixels a side
    x = torch.rand(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), literal(block, x, grid))


def test_piece_of_one_row_attends_to_it():
    """The authors' code cannot process 57 rows: eight pieces of 8 rows leave one row."""
    torch.manual_seed(0)
    block = NonLocal(6, 3, 8).double()
    x = torch.rand(1, 6, 57, 16, dtype=torch.float64, requires_grad=True)
    y = block(x)
    y[..., -1, :].sum().backward()
    assert x.grad is not None
    assert x.grad[..., -1, :].all()
    assert not x.grad[..., :-1, :].any()


def test_unpooling_equals_torch():
    x = torch.rand(2, 3, 7, 9)
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    expected = F.max_unpool2d(pooled, indices, 2, output_size=x.shape[2:])
    assert torch.equal(unpool(pooled, indices, x), expected)


def test_three_levels():
    with pytest.raises(DerainError, match=r"\[8, 4\]"):
        NLEDN(grids=[8, 4])
