"""NeRD-Rain against recorded outputs of its authors' code."""

import numpy as np
import pytest
import torch

from derain.errors import DerainError
from derain.networks.nerd_rain import Feedback, ImplicitRepresentation, NeRDRain, halved
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
from tests.nn.references import with_random_parameters

TINY = {"dim": 4, "blocks": [1, 2, 1], "heads": [1, 2, 2], "expansion": 2.5, "width": 8}
FURTHER = {"mid": "half", "small": "quarter", "inr_mid": "implicit_half", "inr_small": "implicit_quarter"}
VARIANTS = pytest.mark.parametrize(("name", "dim"), [("nerd_rain", 48), ("nerd_rain_s", 32)])


def tiny(**changes):
    torch.manual_seed(0)
    return with_random_parameters(NeRDRain(**{**TINY, **changes})).eval()


def images(*size, count=1):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.slow
def test_the_small_one_equals_the_authors_code():
    network, golden = NeRDRain(dim=32), Golden("nerd_rain_s")
    load(network, golden)
    check_gradients(network, golden, names=FURTHER)
    network.window = 32
    check_outputs(network, golden)


@pytest.mark.slow
def test_it_equals_the_authors_code():
    network, golden = NeRDRain(dim=48, window=64), Golden("nerd_rain")
    load(network, golden)
    check_outputs(network, golden, names=FURTHER, dtypes=[torch.float32], sizes=["64x64"])


@VARIANTS
def test_parameters_and_options(name, dim):
    golden = Golden(name)
    with torch.device("meta"):
        network = NeRDRain(dim=dim)
    check_parameters(network, golden)
    options = {"dim": dim, "blocks": [2, 3, 3], "heads": [1, 2, 4], "expansion": 2.66, "width": 256}
    assert NeRDRain.options_of(golden.shapes()) == options


def test_options_of_other_shapes():
    assert NeRDRain.options_of(published_state(NeRDRain(**TINY), Golden("nerd_rain"))) == TINY


def test_other_networks_are_not_taken_for_it():
    check_recognition(NeRDRain, "nerd_rain", "nerd_rain_s")


@pytest.mark.slow
def test_any_size_and_independent_images():
    check_sizes(tiny(), (1, 1), (33, 18))
    check_sizes(tiny(window=16), (5, 33))


def test_windows_are_restored_alone_and_the_last_ones_are_aligned():
    network = tiny(window=16)
    rainy = images(35, 16)
    with torch.no_grad():
        derained = network(rainy)
        torch.testing.assert_close(derained[:, :, 16:32], network(rainy[:, :, 16:32]), atol=1e-12, rtol=0)
        torch.testing.assert_close(derained[:, :, 32:], network(rainy[:, :, 19:35])[:, :, 13:], atol=1e-12, rtol=0)


def test_training_restores_whole_images():
    network = tiny(window=16)
    rainy = images(16, 32)
    with torch.no_grad():
        whole = tiny(window=32)(rainy)
        assert not torch.allclose(network(rainy), whole)
        network.train()
        torch.testing.assert_close(network(rainy), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"window": 40}, "window 40"), ({"window": 0}, "window 0"), ({"blocks": [1, 1]}, "three numbers")],
)
def test_wrong_options_are_reported(changes, message):
    with pytest.raises(DerainError, match=message):
        NeRDRain(**{**TINY, **changes})


def test_each_output_has_a_target_of_its_size():
    network = tiny().train()
    rainy, clean = images(21, 40), images(21, 40) / 2
    outputs = network.outputs(rainy)
    targets = network.targets(rainy, clean, outputs)
    assert targets["derained"] is clean
    assert {name: target.shape for name, target in targets.items()} == {name: x.shape for name, x in outputs.items()}
    sum(output.square().mean() for output in outputs.values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_pyramid_is_blurred_by_a_binomial_and_averaged():
    image = images(8, 6)[:, :2].numpy()
    padded = np.pad(image, ((0, 0), (0, 0), (2, 2), (2, 2)), "reflect")
    weights = (1, 4, 6, 4, 1)
    blurred = sum(
        weights[i] * weights[j] / 256 * padded[:, :, i : i + 8, j : j + 6] for i in range(5) for j in range(5)
    )
    expected = sum(blurred[:, :, i::2, j::2] for i in range(2) for j in range(2)) / 4
    torch.testing.assert_close(halved(torch.from_numpy(image)), torch.from_numpy(expected))


def test_implicit_representation_is_a_perceptron_of_neighbours_and_constants():
    network = with_random_parameters(ImplicitRepresentation(2, 5))
    latent = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features = network.upsample(latent).permute(0, 3, 1, 2)
    neighbours = torch.nn.functional.unfold(features, 3, padding=1).transpose(1, 2)
    constants = torch.tensor([0.0] * 18 + [2.0, 2.0], dtype=torch.float64).expand(2, 96, 20)
    colours = network.layers(network.first(torch.cat((neighbours, constants), dim=2)))
    torch.testing.assert_close(network(latent), colours.reshape(2, 8, 12, 3))


def test_feedback_is_sampled_after_the_gates():
    network = with_random_parameters(Feedback(3))
    first, second = torch.randn(2, 2, 3, 6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    attention = (network.query(first) * network.key(second)).sigmoid()
    total = 0
    for x, layer in ((first, network.gates1), (second, network.gates2)):
        joined = torch.cat((x, x * attention), dim=1)
        gates = torch.nn.functional.conv2d(joined, layer.weight, layer.bias, padding=1)
        total = total + x * gates[:, :1] + x * attention * gates[:, 1:]
    ours = network(first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, total[:, :, ::2, ::2])
