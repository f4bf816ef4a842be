"""MPRNet against recorded outputs of the authors' code."""

import pytest
import torch

from derain.errors import DerainError
from derain.networks.mprnet import MPRNet, halved, joined, upsampled
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

TINY = {"width": 4, "growth": 2, "refinement_growth": 3, "refinement_blocks": 1, "reduction": 2}


@pytest.fixture(scope="module")
def golden():
    return Golden("mprnet")


@pytest.fixture(scope="module")
def network(golden):
    network = MPRNet()
    load(network, golden)
    return network


@pytest.mark.slow
def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


@pytest.mark.slow
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={"stage1": "stage1", "stage2": "stage2"})


def test_parameters(network, golden):
    check_parameters(network, golden)


def test_recognition(golden):
    check_recognition(MPRNet, "mprnet")
    assert MPRNet.options_of(golden.shapes()) == {
        "width": 40,
        "growth": 20,
        "refinement_growth": 16,
        "refinement_blocks": 8,
        "reduction": 4,
    }


@pytest.mark.parametrize("blocks", [1, 2])
def test_options_of_other_sizes(golden, blocks):
    options = TINY | {"refinement_blocks": blocks}
    network = MPRNet(**options)
    published = published_state(network, golden)
    if blocks == 1:  # the convolution behind the blocks has their number as its index
        for group in (1, 2, 3):
            name = f"stage3_orsnet.orb{group}.body"
            published[f"{name}.1.weight"] = published.pop(f"{name}.8.weight")
    assert MPRNet.options_of(published) == options
    network.load_state_dict(MPRNet.translate(published))


def test_unequal_slopes_are_refused(golden):
    state = golden.state()
    state["stage2_decoder.skip_attn1.body.1.weight"] = torch.zeros(1)
    with pytest.raises(DerainError, match=r"stage2_decoder\.skip_attn1\.body\.1\.weight"):
        MPRNet.translate(state)


def test_any_size():
    torch.manual_seed(0)
    check_sizes(MPRNet(**TINY))


def test_halves_of_a_batch():
    x = torch.arange(2 * 4 * 6.0).reshape(2, 1, 4, 6)
    assert torch.equal(halved(x, 2), torch.cat((x[:, :, :2], x[:, :, 2:])))
    assert torch.equal(halved(x, 3), torch.cat((x[..., :3], x[..., 3:])))
    for dim in (2, 3):
        assert torch.equal(joined(halved(x, dim), dim), x)


def test_upsampling_commutes_with_pointwise_convolutions():
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(5, 3, 1, bias=False).double(), torch.rand(2, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(upsampled(conv(x)), conv(upsampled(x)))
