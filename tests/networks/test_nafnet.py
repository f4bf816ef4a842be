"""NAFNet as ClearView publishes it, compared with recorded outputs of its code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.networks.nafnet import NAFBlock, NAFNet
from derain.nn import restormer
from tests.networks.goldens import (
    Golden,
    check_gradients,
    check_outputs,
    check_recognition,
    check_sizes,
    load,
    published_state,
)

SYSTEMS = {
    "clearview_nafnet": ((32, [2, 2, 4, 8], 4, [2, 2, 2, 2]), 14_344_483),
    "clearview_nafnet_small": ((16, [1, 1, 1, 1], 1, [1, 1, 1, 1]), 1_137_203),
}
NAMES = ("width", "encoder_blocks", "middle_blocks", "decoder_blocks")
TINY = {"width": 4, "encoder_blocks": [1, 2, 1, 1], "middle_blocks": 2, "decoder_blocks": [1, 1, 2, 1]}


def random(network):
    """Return a network in float64 with random parameters: the factors of the residuals are 0 at first."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.double().eval()


def loaded(name):
    golden = Golden(name)
    network = NAFNet(**NAFNet.options_of(golden.shapes()))
    load(network, golden)
    return network, golden


@pytest.mark.parametrize("name", SYSTEMS)
def test_options_and_parameters(name):
    options, parameters = SYSTEMS[name]
    expected = dict(zip(NAMES, options, strict=True))
    assert NAFNet.options_of(Golden(name).shapes()) == expected
    with torch.device("meta"):
        network = NAFNet(**expected)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_small_one_equals_the_authors():
    network, golden = loaded("clearview_nafnet_small")
    check_outputs(network, golden)
    check_gradients(network, golden)


@pytest.mark.slow
def test_outputs_equal_the_authors():
    network, golden = loaded("clearview_nafnet")
    check_outputs(network, golden, dtypes=[torch.float64])


def test_recognition():
    check_recognition(NAFNet, *SYSTEMS)


def test_options_of_other_sizes():
    network = NAFNet(**TINY)
    published = published_state(network, Golden("clearview_nafnet"))
    assert NAFNet.options_of(published) == TINY
    network.load_state_dict(NAFNet.translate(published))


def test_any_size():
    check_sizes(random(NAFNet(**TINY)))


def test_images_are_padded_with_zeros():
    network, rainy = random(NAFNet(**TINY)), torch.rand(1, 3, 21, 30, dtype=torch.float64)
    with torch.no_grad():
        padded = network(F.pad(rainy, (0, 2, 0, 11)))
        torch.testing.assert_close(network(rainy), padded[..., :21, :30])


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize(("images", "gradient"), [(1, False), (2, False), (2, True)])
def test_block_is_the_papers(images, gradient, kernel_size, monkeypatch):
    """The paper's formulas on tensors (b, c, h, w), without strips."""
    block, x = random(NAFBlock(6, kernel_size)), torch.rand(images, 29, 5, 6, dtype=torch.float64)
    monkeypatch.setattr(restormer, "STRIP_BYTES", {"cpu": 1, "gpu": 1})

    def normalised(image, norm):
        variance, mean = torch.var_mean(image, 1, correction=0, keepdim=True)
        weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
        return (image - mean) / (variance + 1e-6).sqrt() * weight + bias

    with torch.no_grad():
        image = x.permute(0, 3, 1, 2)
        hidden = block.depthwise(block.expand(normalised(image, block.norm1)))
        hidden = hidden[:, :6] * hidden[:, 6:]
        hidden = hidden * block.attention(F.adaptive_avg_pool2d(hidden, 1))
        image = image + block.project(hidden) * block.factor1
        hidden = block.feed_in(normalised(image, block.norm2))
        expected = image + block.feed_out(hidden[:, :6] * hidden[:, 6:]) * block.factor2
    with torch.set_grad_enabled(gradient):
        torch.testing.assert_close(block(x).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("option", ["encoder_blocks", "decoder_blocks"])
def test_other_numbers_of_levels_are_refused(option):
    with pytest.raises(DerainError, match=r"\[1, 1, 1\]"):
        NAFNet(**TINY | {option: [1, 1, 1]})


def test_unshuffled_pixels():
    """The network sees a quarter of the pixels with four times the channels, and changes the full image."""
    options = {"width": 4, "encoder_blocks": [1, 1], "middle_blocks": 1, "decoder_blocks": [1, 1]}
    network = random(NAFNet(**options, unshuffle=2, kernel_size=5))
    rainy = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    squares = torch.empty(1, 12, 8, 12, dtype=torch.float64)
    for channel, row, column in np.ndindex(3, 2, 2):
        squares[:, 4 * channel + 2 * row + column] = rainy[:, channel, row::2, column::2]
    with torch.no_grad():
        x = network.embedding(squares).permute(0, 2, 3, 1)
        fine = network.encoder[0](x)
        coarse = network.encoder[1](network.down[0](fine))
        x = network.decoder[1](network.up[1](network.middle(network.down[1](coarse))) + coarse)
        change = network.output(network.decoder[0](network.up[0](x) + fine).permute(0, 3, 1, 2))
        expected = rainy.clone()
        for channel, row, column in np.ndindex(3, 2, 2):
            expected[:, channel, row::2, column::2] += change[:, 4 * channel + 2 * row + column]
        torch.testing.assert_close(network(rainy), expected)
    check_sizes(network)


def test_refinement():
    """Convolutions at full resolution see both images and the features, and correct the derained image."""
    options = {"width": 4, "encoder_blocks": [1], "middle_blocks": 1, "decoder_blocks": [1], "unshuffle": 2}
    network = random(NAFNet(**options, refinement_layers=2))
    rainy = torch.rand(2, 3, 12, 16, dtype=torch.float64)
    features = []
    network.decoder[0].register_forward_hook(lambda _, arguments, output: features.append(output.permute(0, 3, 1, 2)))
    refinement, network.refinement = network.refinement, None
    with torch.no_grad():
        derained = network(rainy)
        up = refinement.up(features[0])
        x = refinement.embedding(torch.cat((rainy, derained), dim=1))
        for row, column, channel in np.ndindex(2, 2, 2):
            x[:, channel, row::2, column::2] += up[:, 4 * row + 2 * column + channel]
        for layer in refinement.layers:
            x = layer(x).clamp_min(0)
        expected = derained + refinement.output(x)
        network.refinement = refinement
        torch.testing.assert_close(network(rainy), expected)
    check_sizes(network)


def test_new_refinement_changes_nothing():
    torch.manual_seed(0)
    network = NAFNet(width=4, encoder_blocks=[1], middle_blocks=1, decoder_blocks=[1], unshuffle=2, refinement_layers=1)
    rainy = torch.rand(1, 3, 12, 16)
    refined = network(rainy)
    network.refinement = None
    assert torch.equal(network(rainy), refined)


@pytest.mark.parametrize(
    "option",
    [{"kernel_size": 4}, {"kernel_size": 1}, {"unshuffle": 0}, {"encoder_blocks": []}, {"refinement_layers": -1}],
)
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(DerainError, match=next(iter(option))):
        NAFNet(**option)
