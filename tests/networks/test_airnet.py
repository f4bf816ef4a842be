"""AirNet against recorded outputs of the authors' code."""

import inspect

import pytest
import torch

from derain.networks.airnet import AirNet, Guidance
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

TINY = {"channels": 4, "groups": 2, "blocks": 1}


@pytest.fixture(scope="module")
def golden():
    return Golden("airnet")


@pytest.fixture(scope="module")
def network(golden):
    network = AirNet()
    load(network, golden)
    return network


def tiny():
    torch.manual_seed(0)
    network = AirNet(**TINY).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return network


@pytest.mark.slow
def test_it_equals_the_authors_network(network, golden):
    check_outputs(network, golden, crop=16)


@pytest.mark.slow
def test_it_trains_like_the_authors_network(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_610_377


def test_it_recognises_its_weights(golden):
    defaults = {name: parameter.default for name, parameter in inspect.signature(AirNet).parameters.items()}
    assert AirNet.options_of(golden.shapes()) == defaults


def test_it_recognises_no_other_weights():
    check_recognition(AirNet, "airnet")


def test_options_of_another_size():
    network = AirNet(channels=4, groups=3, blocks=2).eval()
    published = published_state(network, Golden("airnet"))
    again = AirNet(**AirNet.options_of(published))
    again.load_state_dict(AirNet.translate(published), strict=True)
    rainy = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(rainy), network(rainy))


def test_sizes():
    check_sizes(tiny())


def test_training_adds_the_embedding():
    network, rainy = tiny(), torch.rand(2, 3, 16, 16)
    assert list(network.outputs(rainy)) == ["derained"]
    outputs = network.train().outputs(rainy)
    assert outputs["embedding"].shape == (2, network.encoder.width)
    torch.testing.assert_close(network.encoder(rainy), outputs["embedding"])


def test_guidance_before_training_is_a_convolution_with_masks_of_one_half():
    layer = Guidance(4)
    x, guide = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    convolved = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    expected = x + convolved / 2 + layer.scale(guide) * x + layer.shift(guide)
    torch.testing.assert_close(layer(x, guide), expected, atol=1e-5, rtol=1e-5)
