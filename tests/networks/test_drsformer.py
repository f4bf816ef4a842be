"""DRSformer against recorded outputs of its authors' code."""

import math

import numpy as np
import pytest
import torch

from derain.networks.drsformer import DRSformer, MixedScaleFeedForward, SparseAttention
from derain.nn import restormer
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

TINY = {"dim": 8, "blocks": [1, 2, 1, 1], "heads": [1, 2, 2, 4], "expansion": 2.66}
VARIANTS = pytest.mark.parametrize(("name", "experts"), [("drsformer", True), ("drsformer_light", False)])


def tiny(**changes):
    torch.manual_seed(0)
    return with_random_parameters(DRSformer(**{**TINY, **changes})).eval()


@VARIANTS
def test_parameters(name, experts):
    with torch.device("meta"):
        network = DRSformer(experts=experts)
    check_parameters(network, Golden(name))


@pytest.mark.slow
@VARIANTS
def test_it_equals_the_authors_code(name, experts):
    network, golden = DRSformer(experts=experts), Golden(name)
    load(network, golden)
    if experts:  # in float32 near ties of the top k at the other size
        check_gradients(network, golden)
        check_outputs(network, golden, dtypes=[torch.float64])
        check_outputs(network, golden, dtypes=[torch.float32], sizes=["64x64"])
    else:
        check_outputs(network, golden)


@VARIANTS
def test_options_are_read_from_the_authors_shapes(name, experts):
    options = {"dim": 48, "blocks": [4, 6, 6, 8], "heads": [1, 2, 4, 8], "expansion": 2.66, "experts": experts}
    assert DRSformer.options_of(Golden(name).shapes()) == options


@pytest.mark.parametrize("experts", [True, False])
def test_options_of_other_shapes(experts):
    options = {**TINY, "experts": experts}
    assert DRSformer.options_of(published_state(DRSformer(**options), Golden("drsformer"))) == options


def test_other_networks_are_not_taken_for_it():
    check_recognition(DRSformer, "drsformer", "drsformer_light")


@pytest.mark.parametrize("experts", [True, False])
def test_any_size_and_independent_images(experts):
    check_sizes(tiny(experts=experts))


def test_strips_do_not_change_the_result(monkeypatch):
    network = tiny()
    rainy = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        whole = network(rainy)
        monkeypatch.setattr(restormer, "STRIP_BYTES", {"cpu": 1, "gpu": 1})
        torch.testing.assert_close(network(rainy), whole, atol=1e-12, rtol=0)


def test_sparse_attention_sums_softmaxes_over_the_largest_scores():
    attention = SparseAttention(14, 2)
    for index in range(4):
        attention.get_parameter(f"factor{index + 1}").data.fill_(index + 1)
    scores = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.zeros_like(scores)
    for index, count in enumerate((3, 4, 5, 5)):  # of 7: a half, 2/3, 3/4, 4/5, rounded down
        for row in np.ndindex(2, 2, 7):
            values = scores[row].tolist()
            kept = sorted(range(7), key=lambda key, values=values: -values[key])[:count]
            total = sum(math.exp(values[key]) for key in kept)
            for key in kept:
                expected[row][key] += (index + 1) * math.exp(values[key]) / total
    torch.testing.assert_close(attention.double().normalize(scores), expected)


def test_one_channel_of_a_head_attends_to_itself():
    attention = SparseAttention(2, 2)
    torch.testing.assert_close(attention.normalize(torch.randn(1, 2, 1, 1)), torch.full((1, 2, 1, 1), 0.8))


@pytest.mark.parametrize("channels", [4, 5])
def test_the_second_convolutions_have_two_channels_in_each_group(channels):
    network = with_random_parameters(MixedScaleFeedForward(channels, 1.0))
    x = torch.randn(1, 6, 7, channels, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    hidden = network.project_in(x.permute(0, 3, 1, 2))
    fine, wide = network.first3(hidden).relu(), network.first5(hidden).relu()
    first = torch.cat((fine[:, :channels], wide[:, :channels]), dim=1)
    second = torch.cat((fine[:, channels:], wide[:, channels:]), dim=1)
    scales = (network.second3(first).relu(), network.second5(second).relu())
    expected = network.project_out(torch.cat(scales, dim=1)).permute(0, 2, 3, 1)
    torch.testing.assert_close(network(x, network.kernels()), expected)
