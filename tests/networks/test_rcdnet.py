"""RCDNet compared with recorded outputs of the authors' two codes."""

import math

import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.networks.base import translate_name
from derain.networks.rcdnet import RCDNet, streaks, transposed_convolution
from tests.networks.goldens import (
    Golden,
    check_gradients,
    check_outputs,
    check_parameters,
    check_recognition,
    check_sizes,
    load,
    published_state,
    unused_numbers,
)

TINY = {"stages": 2, "maps": 3, "dual": 2, "blocks": 1}
OUTPUTS = {"B0": "background0", "B1": "background1", "rain_last": "rain17"}
"""Our names of the recorded outputs."""


def grey_levels(output):
    return output * 255


@pytest.fixture(scope="module", params=["rcdnet", "rcdnet_simple"])
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def network(golden):
    network = RCDNet(**RCDNet.options_of(golden.shapes()))
    load(network, golden)
    return network


@pytest.mark.slow
def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden, to_authors=grey_levels)


@pytest.mark.slow
@pytest.mark.parametrize("golden", ["rcdnet"], indirect=True)  # the other has the same layers by other names
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names=OUTPUTS, to_authors=grey_levels)
    norms = golden.gradient_norms()
    gradient = network.background_steps.grad.flatten()  # two tensors of the authors are one of ours
    found = [float(part.norm()) for part in (gradient[:1], gradient[1:])]
    assert found == pytest.approx([norms["eta2"], norms["eta12"]], rel=1e-6)


def test_parameters(network, golden):
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == 2_975_186
    if "conv" not in golden.gradient_norms():
        check_parameters(network, golden)
        return
    unused_kernels = 15 * network.kernel.numel()
    assert parameters + unused_kernels + unused_numbers(RCDNet, golden) == golden.facts["measured"]["params"]


def test_recognition():
    check_recognition(RCDNet, "rcdnet", "rcdnet_simple")
    published = Golden("rcdnet_simple")
    for options in (TINY | {"kernel": 5}, {"stages": 1, "maps": 2, "dual": 4, "blocks": 2, "kernel": 3}):
        network = RCDNet(**options)
        state = published_state(network, published)
        assert RCDNet.options_of(state) == options
        network.load_state_dict(RCDNet.translate(state))


def test_names_of_the_first_code():
    network = RCDNet(**TINY)
    with torch.no_grad():
        network.background_steps.copy_(torch.tensor([[4.0], [6.0]]))
    own = network.state_dict()
    keys = [key for key, *_ in Golden("rcdnet").rows()]
    names = {key: translate_name(key, RCDNet.published_names) for key in keys}
    state = {key: own[name] for key, name in names.items() if name in own}
    kernels = torch.stack([torch.zeros_like(network.kernel), own["kernel"]])
    steps = {"eta1": torch.ones(1), "eta2": torch.tensor([4.0]), "eta12": torch.tensor([[6.0]])}
    state |= {"conv": kernels, "eta11": own["rain_steps"], **steps}
    assert RCDNet.options_of(state) == TINY | {"kernel": 9}
    translated = RCDNet.translate(state)
    assert translated.keys() == own.keys()
    for name, tensor in translated.items():
        torch.testing.assert_close(tensor, own[name], msg=name)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(RCDNet(**TINY))


@pytest.mark.parametrize("options", [{"stages": 0}, {"maps": 0}, {"kernel": 4}])
def test_options_out_of_range(options):
    (name, value), *_ = options.items()
    with pytest.raises(DerainError, match=f"{name} {value}"):
        RCDNet(**options)


def test_forward_is_the_output():
    torch.manual_seed(0)
    network, rainy = RCDNet(**TINY).eval(), torch.rand(1, 3, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(rainy), network.outputs(rainy)["derained"], rtol=0, atol=0)


def test_targets():
    rainy, clean = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    network = RCDNet(**TINY)
    targets = network.targets(rainy, clean, network.outputs(rainy))
    rain = {name for name, target in targets.items() if target is not clean}
    assert rain == {"rain1", "rain2"}
    torch.testing.assert_close(targets["rain2"], rainy - clean)


def test_transposed_convolution_is_the_adjoint():
    torch.manual_seed(0)
    kernels, maps = torch.rand(3, 4, 5, 5).double(), torch.rand(1, 4, 6, 9).double()
    rain = torch.rand(1, 3, 6, 9).double()
    product = (F.conv2d(maps, kernels, padding=2) * rain).sum()
    torch.testing.assert_close((transposed_convolution(rain, kernels) * maps).sum(), product)


def test_streaks_equal_the_formula_of_the_authors():
    kernels = streaks(32, 9)
    for number in range(1, 33):
        length, flat, deviation = (2.5 + number / 4, 0, 0.25) if number <= 12 else (2 + number / 4, 1, 0.5)
        expected = [
            [
                math.exp(-(max(abs(x) - flat, 0) ** 2 + (max(abs(y) - flat, 0) / length) ** 2) / (2 * deviation**2))
                for x in range(-4, 5)
            ]
            for y in range(-4, 5)
        ]
        expected = torch.tensor(expected) / sum(map(sum, expected))
        for channel in range(3):
            torch.testing.assert_close(kernels[channel, number - 1], expected)
    assert streaks(1, 1).tolist() == [[[[1.0]]]] * 3
