"""Syn2Real compared with recorded outputs of the authors' code."""

import pytest
import torch
import torch.nn.functional as F

from derain.networks.syn2real import DenseBlock, Syn2Real, Transition
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

TINY = {"channels": 8, "base_width": 8, "groups": 2, "parts": 3}


@pytest.fixture(scope="module")
def golden():
    return Golden("syn2real")


@pytest.fixture(scope="module")
def network(golden):
    network = Syn2Real(**Syn2Real.options_of(golden.shapes()))
    load(network, golden)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


def test_features_and_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={"z": "features"})


def test_parameters(network, golden):
    check_parameters(network, golden)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_605_710


def test_recognition(golden):
    check_recognition(Syn2Real, "syn2real")
    assert Syn2Real.options_of(golden.shapes()) == {"channels": 16, "base_width": 12, "groups": 8, "parts": 6}
    state = published_state(Syn2Real(**TINY), golden)
    assert Syn2Real.options_of(state) == TINY
    Syn2Real(**TINY).load_state_dict(Syn2Real.translate(state), strict=True)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(Syn2Real(**TINY))


def test_features_have_an_eighth_of_the_size():
    torch.manual_seed(0)
    outputs = Syn2Real(**TINY).eval().outputs(torch.rand(2, 3, 20, 33))
    assert list(outputs) == ["derained", "features"]
    assert outputs["features"].shape == (2, 16, 3, 5)


def test_transition_averages_before_or_after_the_convolution():
    torch.manual_seed(0)
    transition = Transition(4, 6, "down").double()
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    after = F.avg_pool2d(transition.conv(F.relu(F.batch_norm(x, None, None, training=True))), 2)
    torch.testing.assert_close(transition(x), after)


def test_block_of_parts():
    """Without a middle part, the last part is its own result, and the first is convolved alone."""
    torch.manual_seed(0)
    block = DenseBlock(4, width=6, parts=2, groups=3).double().eval()
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    scale = (1 + 1e-5) ** -0.5  # of a normalisation with its initial statistics
    hidden = F.conv2d(F.relu(x * scale), block.expand.weight)
    first = F.conv2d(F.relu(hidden[:, :6] * scale), block.convs[0].weight, padding=1, groups=3)
    joined = torch.cat((first, hidden[:, 6:]), 1)
    expected = F.conv2d(F.relu(joined * scale), block.project.weight) + x
    torch.testing.assert_close(block(x), torch.cat((x, expected), 1))
