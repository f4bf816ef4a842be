"""DCSFN compared with recorded outputs of the authors' code."""

import pytest
import torch

from derain.networks.dcsfn import DCSFN
from tests.networks.goldens import (
    Golden,
    check_gradients,
    check_outputs,
    check_parameters,
    check_recognition,
    check_sizes,
    load,
)

TINY = {"channels": 4, "blocks": 2, "convolutions": 1}


@pytest.fixture(scope="module")
def golden():
    return Golden("dcsfn")


@pytest.fixture(scope="module")
def network(golden):
    network = DCSFN(**DCSFN.options_of(golden.shapes()))
    load(network, golden)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


@pytest.mark.slow
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)


def narrow_state(golden):
    """Return the authors' tensors of a network of width 8 with two blocks of two convolutions."""
    state = {}
    for name, tensor in golden.state().items():
        parts = name.split(".")
        if "units" in parts and (int(parts[2]) >= 2 or (parts[3].startswith("scale") and int(parts[4]) >= 2)):
            continue
        if "conv1x1" in parts and int(parts[2]) >= 2:
            continue
        state[name] = tensor[tuple(slice(side * 8 // 20 if side % 20 == 0 else side) for side in tensor.shape)]
    return state


def test_recognition(golden):
    check_recognition(DCSFN, "dcsfn")
    narrow = narrow_state(golden)
    options = DCSFN.options_of(narrow)
    assert options == {"channels": 8, "blocks": 2, "convolutions": 2}
    DCSFN(**options).load_state_dict(DCSFN.translate(narrow))


def test_any_size():
    torch.manual_seed(0)
    check_sizes(DCSFN(**TINY))
