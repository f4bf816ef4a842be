"""AMIR against recorded outputs of the authors' code, and its routing against loops over pixels."""

import inspect
import math

import pytest
import torch

from derain.errors import DerainError
from derain.networks.amir import AMIR, ChannelRouting, SpatialRouting
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

TINY = {"dim": 8, "blocks": (1, 2, 1, 1), "refinement": 1, "heads": (1, 2, 2, 4), "atoms": 5, "instruction": 7}


@pytest.fixture(scope="module")
def golden():
    return Golden("amir")


@pytest.fixture(scope="module")
def network(golden):
    network = AMIR()
    load(network, golden)
    return network


def tiny(**options):
    torch.manual_seed(0)
    return AMIR(**TINY | options).eval()


def routing(experts=4, selected=2):
    torch.manual_seed(0)
    return SpatialRouting(6, 3, experts, selected, 1.5).double()


@pytest.mark.slow
def test_it_equals_the_authors_network(network, golden):
    check_outputs(network, golden)


@pytest.mark.slow
def test_it_trains_like_the_authors_network(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_543_918


def test_it_recognises_its_weights(golden):
    options = AMIR.options_of(golden.shapes())
    defaults = {name: parameter.default for name, parameter in inspect.signature(AMIR).parameters.items()}
    del defaults["selected"]
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()} == defaults


def test_it_recognises_no_other_weights():
    check_recognition(AMIR, "amir")


def test_options_of_another_size(golden):
    network = tiny(experts=3)
    published = published_state(network, golden)
    again = AMIR(**AMIR.options_of(published))
    again.load_state_dict(AMIR.translate(published), strict=True)
    rainy = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(rainy), network(rainy))


def test_sizes():
    check_sizes(tiny())


@pytest.mark.parametrize("selected", [1, 2, 3])
@torch.no_grad()
def test_pixels_are_mixed_by_their_experts(selected):
    layer = routing(selected=selected).eval()
    x, instruction = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 3).double()
    mixed, loss = layer(x, instruction)
    assert loss is None
    for image, row, column in [(0, 0, 0), (0, 2, 1), (1, 1, 3), (1, 2, 2)]:
        pixel = x[image, row, column]
        logits = torch.cat((pixel, layer.instruction(instruction[image]))) @ layer.gate
        best = sorted(range(4), key=lambda index: -float(logits[index]))[:selected]
        gates = torch.softmax(logits[best], 0)
        outputs = sum(gate * layer.experts[index](pixel).exp() for gate, index in zip(gates, best, strict=True))
        torch.testing.assert_close(mixed[image, row, column], pixel + outputs.log())


def test_all_experts_give_the_same_mixture():
    layer = routing(experts=5, selected=3)
    x, (gates, index) = torch.randn(50, 6).double(), torch.rand(50, 5).double().topk(3)
    selected = layer._mix_selected(x, index, gates.log_softmax(1))
    torch.testing.assert_close(layer._mix_all(x, index, gates.log_softmax(1)), selected)


def test_imbalance_is_that_of_shazeer_et_al():
    clean, deviation = torch.randn(40, 4).double(), torch.rand(40, 4).double() + 0.1
    noisy = clean + deviation * torch.randn(40, 4).double()
    importance, load = [0.0] * 4, [0.0] * 4
    for pixel in range(40):
        values = [float(value) for value in noisy[pixel]]
        best = sorted(range(4), key=lambda index: -values[index])[:2]
        total = sum(math.exp(values[index]) for index in best)
        for index in range(4):
            others = sorted((value for other, value in enumerate(values) if other != index), reverse=True)
            distance = float((clean[pixel, index] - others[1]) / deviation[pixel, index])
            load[index] += 0.5 * (1 + math.erf(distance / math.sqrt(2)))
            importance[index] += math.exp(values[index]) / total if index in best else 0
    expected = 0
    for sums in (importance, load):
        mean = sum(sums) / 4
        expected += sum((value - mean) ** 2 for value in sums) / 3 / mean**2
    assert float(routing()._imbalance(clean, noisy, deviation)) == pytest.approx(expected, rel=1e-5)


def test_training_returns_a_loss_that_reaches_the_gates():
    network = tiny().train()
    outputs = network.outputs(torch.rand(2, 3, 16, 16))
    assert outputs["routing_loss"].shape == ()
    outputs["routing_loss"].backward()
    for layer in network.spatial_routing.values():
        assert layer.gate.grad.abs().max() > 0
        assert layer.noise.grad.abs().max() > 0
    assert list(network.eval().outputs(torch.rand(1, 3, 8, 8))) == ["derained"]


def test_noise_changes_what_pixels_select():
    network, rainy = tiny().train(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(network(rainy), network(rainy))


def test_channel_routing():
    layer = ChannelRouting(4, 3)
    x, instruction = torch.randn(2, 5, 6, 4), torch.randn(2, 3)
    assert torch.equal(layer(x, instruction), x)
    torch.nn.init.normal_(layer.scale)
    torch.nn.init.normal_(layer.shift)
    scale, shift = layer.scale[..., 0, 0], layer.shift[..., 0, 0]
    strength = torch.sigmoid(layer.instruction(instruction))[:, None, None]
    torch.testing.assert_close(layer(x, instruction), x + strength * (scale * x + shift))


@pytest.mark.parametrize("options", [{"blocks": (1, 2)}, {"heads": (1,)}, {"selected": 4}, {"selected": 0}])
def test_wrong_options(options):
    with pytest.raises(DerainError):
        tiny(**options)
