"""BRN compared with recorded outputs of the authors' code."""

from pathlib import Path

import pytest
import torch

from derain.errors import DerainError
from derain.networks.brn import BRN
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

SYSTEMS = {"brn": 8, "brn_icassp": 4}


@pytest.fixture(scope="module", params=[pytest.param("brn", marks=pytest.mark.slow), "brn_icassp"])
def golden(request):
    return Golden(request.param), SYSTEMS[request.param]


@pytest.fixture(scope="module")
def network(golden):
    recorded, iterations = golden
    network = BRN(iterations, **BRN.options_of(recorded.shapes()))
    load(network, recorded)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden[0])


@pytest.mark.parametrize("golden", ["brn_icassp"], indirect=True)  # the other has more iterations of the same layers
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden[0], names={"rain": "rain", "x1": "derained1", "r1": "rain1"})


def test_parameters(network, golden):
    check_parameters(network, golden[0])


def test_recognition(golden):
    check_recognition(BRN, *SYSTEMS)
    state = golden[0].state()
    assert BRN.options_of(state) == {"channels": 32, "image_blocks": 5}
    assert BRN.options_of({f"module.{name}": tensor for name, tensor in state.items()}) == BRN.options_of(state)
    for gate in ("conv_i", "conv_i_r"):  # variants of the paper with one direction only, or none
        assert BRN.options_of({**state, f"{gate}.0.weight": torch.zeros(32, 64, 3, 3)}) is None
    small = {
        name: tensor[tuple(slice({32: 8, 96: 24}.get(side, side)) for side in tensor.shape)]
        for name, tensor in state.items()
        if not name.startswith("res_conv5.")
    }
    options = BRN.options_of(small)
    assert options == {"channels": 8, "image_blocks": 4}
    prefixed = {f"module.{name}": tensor for name, tensor in small.items()}
    BRN(**options).load_state_dict(BRN.translate(prefixed))


@pytest.mark.parametrize(
    ("folder", "iterations", "warnings"),
    [("logs/Rain100L/BRN", 8, 0), ("logs/BRN/R100H", 4, 0), ("downloads", 8, 1), ("BRN/downloads", 8, 1)],
)
def test_iterations_by_folder(folder, iterations, warnings, caplog):
    path = Path(folder) / "net_latest.pth"
    assert BRN.assume(path, {}) == {"iterations": iterations}
    assert len(caplog.records) == warnings
    assert BRN.assume(path, {"iterations": 5}) == {"iterations": 5}
    assert len(caplog.records) == warnings


def test_any_size():
    torch.manual_seed(0)
    check_sizes(BRN(iterations=2, channels=4, rain_blocks=1, image_blocks=2))


def test_targets():
    rainy, clean = torch.rand(1, 3, 6, 5), torch.rand(1, 3, 6, 5)
    network = BRN(iterations=2, channels=4)
    targets = network.targets(rainy, clean, network.outputs(rainy))
    assert list(targets) == ["derained", "rain", "derained1", "rain1"]
    assert targets["derained"] is targets["derained1"] is clean
    for name in ("rain", "rain1"):
        torch.testing.assert_close(targets[name], rainy - clean)


@pytest.mark.parametrize("iterations", [0, 101])
def test_number_of_iterations_is_limited(iterations):
    with pytest.raises(DerainError, match=f"iterations {iterations}"):
        BRN(iterations)


REAL = {"matlab-y": (27.2365, 0.91004), "prenet": (27.2371, 0.91006)}


@pytest.mark.slow
def test_real_image():
    check_real_image(authors_network(BRN, "brn/Rain100H/net_latest.pth"), "Rain100H", 3, REAL)
