"""PromptIR against recorded outputs of the authors' code."""

import inspect

import pytest
import torch

from derain.errors import DerainError
from derain.networks.promptir import Prompt, PromptIR
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
    "dim": 8,
    "blocks": (1, 2, 1, 1),
    "refinement": 1,
    "heads": (1, 2, 2, 4),
    "maps": 3,
    "prompt_channels": (8, 16, 24),
    "prompt_sizes": (8, 6, 4),
    "prompt_heads": 2,
}


@pytest.fixture(scope="module")
def golden():
    return Golden("promptir")


@pytest.fixture(scope="module")
def network(golden):
    network = PromptIR()
    load(network, golden)
    return network


def tiny():
    torch.manual_seed(0)
    return PromptIR(**TINY).eval()


@pytest.mark.slow
def test_it_equals_the_authors_network(network, golden):
    check_outputs(network, golden, crop=16)


@pytest.mark.slow
def test_it_trains_like_the_authors_network(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_376_967


def test_it_recognises_its_weights(golden):
    options = PromptIR.options_of(golden.shapes())
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()} == {
        name: parameter.default for name, parameter in inspect.signature(PromptIR).parameters.items()
    }


def test_it_recognises_no_other_weights():
    check_recognition(PromptIR, "promptir")


def test_options_of_another_size(golden):
    network = tiny()
    published = published_state(network, golden)
    again = PromptIR(**PromptIR.options_of(published))
    again.load_state_dict(PromptIR.translate(published), strict=True)
    rainy = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(rainy), network(rainy))


def test_sizes():
    check_sizes(tiny())


def test_prompt_is_the_weighted_sum_of_maps():
    prompt = Prompt(4, 2, 3, 5)
    torch.nn.init.dirac_(prompt.convolution.weight)
    x = torch.randn(1, 5, 5, 4)
    weights = torch.softmax(prompt.weights(x.reshape(25, 4).mean(0)), 0)
    expected = weights[0] * prompt.maps[0, 0] + weights[1] * prompt.maps[0, 1]
    torch.testing.assert_close(prompt(x)[0].permute(2, 0, 1), expected)


@pytest.mark.parametrize("option", ["blocks", "heads", "prompt_channels", "prompt_sizes"])
def test_wrong_numbers_of_levels(option):
    with pytest.raises(DerainError, match=option):
        PromptIR(**TINY | {option: (1, 2)})
