"""Restormer as ClearView publishes it, compared with recorded outputs of its code."""

import pytest
import torch

from derain.networks.restormer import BiasFreeNorm, Restormer
from derain.nn import restormer
from tests.networks.goldens import Golden, check_gradients, check_outputs, check_recognition, check_sizes, load

SYSTEMS = {
    "clearview_restormer": ({"dim": 48, "blocks": [2, 3, 3, 4], "refinement": 4}, 15_263_563),
    "clearview_restormer_small": ({"dim": 24, "blocks": [1, 1, 1, 2], "refinement": 2}, 2_278_027),
}
CLEARVIEW = {"heads": [1, 2, 4, 8], "expansion": 2.66, "bias": True, "bias_free_norm": True}
TINY = {"dim": 8, "blocks": [1, 2, 1, 1], "refinement": 1, "heads": [1, 2, 2, 4], "expansion": 2.5}


def random(**options):
    torch.manual_seed(0)
    network = Restormer(**options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def loaded(name):
    golden = Golden(name)
    network = Restormer(**Restormer.options_of(golden.shapes()))
    load(network, golden)
    return network, golden


@pytest.mark.parametrize("name", SYSTEMS)
def test_options_and_parameters(name):
    options, parameters = SYSTEMS[name]
    assert Restormer.options_of(Golden(name).shapes()) == options | CLEARVIEW
    with torch.device("meta"):
        network = Restormer(**options, **CLEARVIEW)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_outputs_of_the_small_one_equal_the_authors():
    network, golden = loaded("clearview_restormer_small")
    check_outputs(network, golden)


@pytest.mark.slow
def test_gradients_of_the_small_one_equal_the_authors():
    check_gradients(*loaded("clearview_restormer_small"))


@pytest.mark.slow
def test_outputs_equal_the_authors():
    network, golden = loaded("clearview_restormer")
    check_outputs(network, golden, dtypes=[torch.float64])


def test_recognition():
    check_recognition(Restormer, *SYSTEMS)


def test_options_of_other_sizes():
    network = random(**TINY, bias=True, bias_free_norm=True)
    published = {
        name.removeprefix("body.").replace("patch_embed.proj.", "patch_embed."): tensor
        for name, tensor in network.state_dict().items()
    }
    options = Restormer.options_of(published)
    assert options == TINY | {"bias": True, "bias_free_norm": True}
    Restormer(**options).load_state_dict(Restormer.translate(published))


@pytest.mark.parametrize(("bias", "bias_free_norm"), [(False, False), (True, True)])
def test_any_size(bias, bias_free_norm):
    check_sizes(random(**TINY, bias=bias, bias_free_norm=bias_free_norm))


def test_by_default_it_is_the_authors_restormer():
    torch.manual_seed(0)
    plain = restormer.Restormer(**TINY)
    network = Restormer(**TINY)
    network.load_state_dict(Restormer.translate(plain.state_dict()))
    rainy = torch.rand(1, 3, 17, 9)
    with torch.no_grad():
        assert torch.equal(network(rainy), plain(rainy))


def test_strips_do_not_change_the_result(monkeypatch):
    network = random(**TINY, bias=True, bias_free_norm=True).double()
    rainy = torch.rand(2, 3, 37, 31, dtype=torch.float64)
    with torch.no_grad():
        whole = network(rainy)
        monkeypatch.setattr(restormer, "STRIP_BYTES", {"cpu": 1, "gpu": 1})
        torch.testing.assert_close(network(rainy), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_bias_free_norm(offset):
    torch.manual_seed(0)
    norm, x = BiasFreeNorm(6), torch.randn(2, 3, 4, 6) + offset
    torch.nn.init.normal_(norm.weight)
    wide = x.double()
    expected = (wide / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight).float()
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    network, rainy = random(**TINY, bias=True, bias_free_norm=True), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = network(rainy)
        with torch.autocast("cpu", dtype=dtype):
            assert (network(rainy) - expected).abs().mean() < 0.02
    with torch.autocast("cpu", dtype=dtype):
        assert (network(rainy) - expected).abs().mean() < 0.02
