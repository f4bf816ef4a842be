"""VRGNet's derain net compared with recorded outputs of the authors' code, and with PReNet."""

from pathlib import Path

import pytest
import torch

from derain.errors import DerainError
from derain.methods.prenet.network import PReNet
from derain.networks.vrgnet import VRGNet
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
)


@pytest.fixture(scope="module")
def golden():
    return Golden("vrgnet_derain")


@pytest.fixture(scope="module")
def network(golden):
    network = VRGNet(**VRGNet.options_of(golden.shapes()))
    load(network, golden)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={"logvar": "log_variance"})


def test_parameters(network, golden):
    check_parameters(network, golden)


def test_recognition(golden):
    check_recognition(VRGNet, "vrgnet_derain")
    small = {
        name: tensor[tuple(slice({32: 8, 64: 16}.get(side, side)) for side in tensor.shape)]
        for name, tensor in golden.state().items()
        if "res_conv5" not in name
    }
    options = VRGNet.options_of(small)
    assert options == {"channels": 8, "blocks": 4}
    VRGNet(**options).load_state_dict(VRGNet.translate(small))


def test_stages_before_the_last_are_those_of_prenet(golden):
    prenet = PReNet(stages=3).double()
    names = ((name.removeprefix("derainet."), tensor) for name, tensor in golden.state().items())
    prenet.load_state_dict({name: tensor for name, tensor in names if not name.startswith("convfinal")})
    network = VRGNet(iterations=4).double()
    load(network, golden)
    rainy = torch.rand(1, 3, 17, 12, dtype=torch.float64)
    with torch.no_grad():
        outputs = network.outputs(rainy)
        stages = prenet.every_stage(rainy)
    assert list(outputs) == ["derained", "log_variance", "derained1", "derained2", "derained3"]
    for number, stage in enumerate(stages, 1):
        torch.testing.assert_close(outputs[f"derained{number}"], stage, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "warnings"), [("DerainNet_state_700.pt", 0), ("net_latest.pth", 1)])
def test_iterations_of_files(name, warnings, caplog):
    assert VRGNet.assume(Path(name), {}) == {"iterations": 6}
    assert len(caplog.records) == warnings


@pytest.mark.parametrize("iterations", [1, 101])
def test_number_of_iterations_is_limited(iterations):
    with pytest.raises(DerainError, match=f"iterations {iterations}"):
        VRGNet(iterations)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(VRGNet(iterations=2, channels=4, blocks=1))


REAL = {"matlab-y": (26.7230, 0.87728), "prenet": (26.7120, 0.87728)}


@pytest.mark.slow
def test_real_image():
    network = authors_network(VRGNet, "vrgnet_derain/Rain100H/DerainNet_state_700.pt")
    check_real_image(network, "Rain100H", 3, REAL)
