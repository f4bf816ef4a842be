import importlib.util
from pathlib import Path

import pytest
import safetensors.torch
import spandrel
import torch
from spandrel.architectures.Compact import Compact
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.RetinexFormer import RetinexFormer
from spandrel.architectures.Uformer import Uformer
from torch.utils.flop_counter import FlopCounterMode

from derain.commands import bench
from derain.errors import DerainError
from derain.methods import catalog, spandrel_model
from derain.methods.spandrel_model import MIN_SIDE, SpandrelModule

BUILDS = {
    "NAFNet": lambda: NAFNet(width=8, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1]),
    "RetinexFormer": lambda: RetinexFormer(n_feat=8, stage=1, num_blocks=[1, 1, 1]),
}


@pytest.fixture(params=BUILDS)
def network(request):
    torch.manual_seed(0)
    network = BUILDS[request.param]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return request.param, network


@pytest.mark.parametrize("form", ["plain", "params_ema", "safetensors"])
def test_networks_of_spandrel_equal_spandrel(network, form, tmp_path):
    name, theirs = network
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    state = theirs.state_dict()
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"params": {}, form: state} if form == "params_ema" else state, path)
    loaded, note = catalog.load(path)
    assert isinstance(loaded, SpandrelModule)
    assert note.startswith(name)
    descriptor = spandrel.ModelLoader().load_from_file(path)
    for size in [(37, 31), (64, 48)]:
        rainy = torch.rand(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(loaded(rainy), descriptor(rainy))
    both = torch.rand(2, 3, 20, 24)
    with torch.no_grad():
        assert torch.equal(loaded(both), torch.cat([descriptor(one[None]) for one in both]))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (5, 3), (MIN_SIDE, 1)])
def test_any_size_keeps_its_shape(network, size, tmp_path):
    torch.save(network[1].state_dict(), tmp_path / "w.pth")
    with torch.no_grad():
        assert catalog.load(tmp_path / "w.pth").module(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_sizes_that_a_network_requires_are_used():
    """Uformer takes squares alone."""
    torch.manual_seed(0)
    theirs = Uformer(embed_dim=8, depths=[1] * 9, num_heads=[1] * 9, win_size=4).eval()
    method = spandrel_model.recognise(Path("w.pth"), theirs.state_dict())
    rainy = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        assert method(rainy).shape == rainy.shape
        assert method.pass_once(rainy).shape[2] == method.pass_once(rainy).shape[3]


def test_bench_counts_their_multiplications(tmp_path):
    network = BUILDS["NAFNet"]()
    method = spandrel_model.recognise(tmp_path / "w.pth", network.state_dict())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(1, 3, 16, 16))
    assert bench.count_cost(method, 16)["macs"] == counter.get_total_flops() / 2


def test_networks_of_other_tasks_are_refused(tmp_path):
    cases = {
        "large.pth": (Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2), "enlarges 2 times"),
        "grey.pth": (
            NAFNet(img_channel=1, width=8, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]),
            "1 channels",
        ),
    }
    for name, (network, reason) in cases.items():
        torch.save(network.state_dict(), tmp_path / name)
        with pytest.raises(DerainError, match=reason) as caught:
            catalog.load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    state = BUILDS["NAFNet"]().state_dict()
    state["middle_blks.0.conv1.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "misfit.pth")
    with pytest.raises(DerainError, match=r"misfit\.pth") as caught:
        catalog.load(tmp_path / "misfit.pth")
    assert "\n" not in str(caught.value)


def test_without_spandrel_the_error_names_the_extra(tmp_path, monkeypatch):
    torch.save(BUILDS["NAFNet"]().state_dict(), tmp_path / "w.pth")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spandrel" else found(name))
    with pytest.raises(DerainError, match=r"intro.weight.*pip install 'derain\[others\]'"):
        catalog.load(tmp_path / "w.pth")
