"""SwinIR compared with recorded outputs of the authors' code."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.networks.swinir import SwinIR
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

TINY = {"channels": 12, "blocks": [2, 1], "heads": [2, 3], "window": 4, "expansion": 1.5}


@pytest.fixture(scope="module")
def golden():
    return Golden("swinir")


@pytest.fixture(scope="module")
def network(golden):
    network = SwinIR(**SwinIR.options_of(golden.shapes()))
    load(network, golden)
    return network


def tiny(**options):
    torch.manual_seed(0)
    return SwinIR(**TINY, **options)


def tiny_state(golden):
    """Return the tensors and buffers of a small network by the authors' names."""
    buffers = {
        "layers.0.residual_group.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "layers.0.residual_group.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
    }
    return published_state(tiny(), golden) | buffers


@pytest.mark.slow
def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


@pytest.mark.slow
def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden)


def test_parameters(network, golden):
    check_parameters(network, golden)


def test_recognition(golden):
    check_recognition(SwinIR, "swinir")
    defaults = {name: parameter.default for name, parameter in inspect.signature(SwinIR).parameters.items()}
    options = SwinIR.options_of(golden.shapes())
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()} == {
        name: value for name, value in defaults.items() if name != "drop_path"
    }


def test_recognition_of_another_size(golden):
    """Files have masks and indices too, which depend on the size of the training images."""
    state = tiny_state(golden)
    assert SwinIR.options_of(state) == TINY
    SwinIR(**TINY).load_state_dict(SwinIR.translate(state), strict=True)


@pytest.mark.parametrize(
    "change",
    [
        {"upsample.0.weight": torch.zeros(12, 12, 3, 3)},
        {"layers.0.residual_group.blocks.0.attn.logit_scale": torch.zeros(2, 1, 1)},
        {"conv_first.weight": torch.zeros(12, 1, 3, 3)},
        {"conv_last.weight": torch.zeros(12, 12, 3, 3)},
        {"layers.0.residual_group.blocks.0.attn.relative_position_bias_table": torch.zeros(169, 2)},
    ],
)
def test_other_networks_with_the_same_names(golden, change):
    assert SwinIR.options_of(tiny_state(golden) | change) is None


def test_any_size():
    check_sizes(tiny(), (1, 1), (1, 9), (3, 4), (7, 5), (16, 12), (33, 18))


def test_images_are_mirrored_in_evaluation():
    """A border that the padding repeats is the authors' ``torch.cat((image, image.flip))``; 8 rows become 12."""
    network = tiny().eval().double()
    image = torch.rand(1, 3, 8, 6, dtype=torch.float64)
    padded = torch.cat((image, image.flip(2)), 2)[:, :, :12]
    padded = torch.cat((padded, padded.flip(3)), 3)[..., :8]
    mirrored = []
    network.head.register_forward_pre_hook(lambda module, inputs: mirrored.append(inputs[0]))
    with torch.no_grad():
        network(image)
    torch.testing.assert_close(mirrored[0] + network.mean, padded)


def test_images_are_reflected_in_training():
    network = tiny(drop_path=0.0).double()
    image = torch.rand(1, 3, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(network(image), network(F.pad(image, (0, 2, 0, 0), "reflect"))[..., :6])


def test_skipped_parts_grow_with_depth():
    blocks = [block for group in tiny(drop_path=0.2).groups for block in group.blocks]
    probabilities = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert probabilities == pytest.approx([0, 0.1, 0.2])


def test_one_number_of_heads_per_group():
    with pytest.raises(DerainError, match=r"\[2, 1\].*\[2\]"):
        SwinIR(channels=8, blocks=[2, 1], heads=[2])
