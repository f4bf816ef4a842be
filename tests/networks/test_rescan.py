"""RESCAN compared with recorded outputs of the authors' code."""

import pytest
import torch

from derain.networks.rescan import RESCAN
from derain.nn.conv_gru import ConvGRU
from tests.networks.goldens import (
    Golden,
    check_gradients,
    check_outputs,
    check_parameters,
    check_recognition,
    check_sizes,
    image,
    load,
)

TINY = {"channels": 4, "layers": 3, "iterations": 2, "squeeze": 2}


@pytest.fixture(scope="module")
def golden():
    return Golden("rescan")


@pytest.fixture(scope="module")
def network(golden):
    torch.manual_seed(0)
    network = RESCAN(**RESCAN.options_of(golden.shapes()))
    load(network, golden)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


def test_stages_equal_the_authors(network, golden):
    network.eval().double()
    rainy = image("64x64").double()
    with torch.no_grad():
        outputs = network.outputs(rainy.flip(1))
    network.float()
    assert list(outputs) == ["derained", "stage1", "stage2", "stage3"]
    stages = [outputs[name] for name in ("stage1", "stage2", "stage3", "derained")]
    for number, stage in enumerate(stages, 1):
        rain = torch.from_numpy(golden.arrays[f"rain{number}_64x64"]).double()
        torch.testing.assert_close(rainy - stage.flip(1), rain, rtol=0, atol=1e-6)


def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)


def test_recognition(golden):
    check_recognition(RESCAN, "rescan")
    narrow = {
        name: tensor[tuple(slice(8 if side == 24 else 3) for side in tensor.shape)]
        for name, tensor in golden.state().items()
        if not name.startswith(("rnns.3.", "rnns.4."))
    }
    options = RESCAN.options_of(narrow)
    assert options == {"channels": 8, "layers": 3, "squeeze": 3}
    RESCAN(**options).load_state_dict(RESCAN.translate(narrow))


def test_any_size():
    torch.manual_seed(0)
    check_sizes(RESCAN(**TINY))


def test_first_stage_has_no_state():
    """Without a state, the GRU is that with a state of zeros, since the biases of U are then zero."""
    torch.manual_seed(0)
    gru = ConvGRU(3, 4, dilation=2).double()
    x = torch.rand(1, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        for name in ("update", "reset", "candidate"):
            gru.get_parameter(f"{name}_state.bias").zero_()
        torch.testing.assert_close(gru(x, None), gru(x, torch.zeros(1, 4, 9, 8, dtype=torch.float64)))
