"""SSID-KD's network compared with recorded outputs of the authors' code."""

import pytest
import torch

from derain.errors import DerainError
from derain.networks.ssid_kd import SSIDKD
from tests.networks.goldens import (
    Golden,
    check_gradients,
    check_outputs,
    check_parameters,
    check_recognition,
    check_sizes,
    load,
)

TINY = {"channels": [4, 5, 6], "repeats": [2, 1, 2], "convolutions": 1}


@pytest.fixture(scope="module")
def golden():
    return Golden("ssid_kd")


@pytest.fixture(scope="module")
def network(golden):
    network = SSIDKD(**SSIDKD.options_of(golden.shapes()))
    load(network, golden)
    return network


@pytest.mark.slow
def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


@pytest.mark.slow
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)


def narrow_state(golden):
    """Return the authors' tensors of a network of a quarter of the width with two convolutions at each scale."""
    state = {}
    for name, tensor in golden.state().items():
        parts = name.split(".")
        if len(parts) > 6 and parts[6].startswith("scale") and int(parts[7]) >= 2:
            continue
        state[name] = tensor[tuple(slice(side // 4 if side % 8 == 0 else side) for side in tensor.shape)]
    return state


def test_recognition(golden):
    check_recognition(SSIDKD, "ssid_kd")
    narrow = narrow_state(golden)
    options = SSIDKD.options_of(narrow)
    assert options == {"channels": [6, 8, 12], "convolutions": 2}
    SSIDKD(**options).load_state_dict(SSIDKD.translate(narrow))


def test_copies_of_a_shared_block_must_be_equal(golden):
    state = golden.state()
    name = "encoder_decoder_4.enLayer_4.units.1.unit.1.confusion.bias"
    state[name] = state[name] + 1
    with pytest.raises(DerainError, match=r"units\.1\."):
        SSIDKD.translate(state)


def test_outputs_and_targets():
    torch.manual_seed(0)
    network = SSIDKD(**TINY)
    rainy, clean = torch.rand(2, 1, 3, 40, 52)
    outputs = network.outputs(rainy)
    targets = network.targets(rainy, clean, outputs)
    torch.testing.assert_close(rainy - outputs["rain"], outputs["derained"])
    assert outputs["code"].shape == (1, 6, 10, 13)
    assert torch.equal(targets["derained"], clean)
    assert torch.equal(targets["rain"], rainy - clean)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(SSIDKD(**TINY))
