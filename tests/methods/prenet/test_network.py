"""PReNet compared with a literal implementation of its published form."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spandrel.architectures.NAFNet import NAFNet

from derain.errors import DerainError
from derain.images import read_rgb
from derain.methods import PReNetModule, catalog
from derain.methods.prenet.network import VARIANTS, PReNet, variant_of
from derain.restoration import Restorer
from tests.networks.goldens import check_real_image

PARAMETERS = {"PReNet": 168_963, "PReNet_r": 94_979, "PRN": 95_107, "PRN_r": 21_123, "PReNet_LSTM": 168_963}


def literal(state, rainy, stages=6, residual=True):
    """Every stage as the authors compute it: zero states, all joined inputs, four gates of all weights."""

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    b, _, height, width = rainy.shape
    h = torch.zeros(b, 32, height, width, dtype=rainy.dtype)
    c = torch.zeros(b, 32, height, width, dtype=rainy.dtype)
    x, outputs = rainy, []
    for _ in range(stages):
        x = F.relu(conv("conv0.0", torch.cat((rainy, x), 1)))
        if "conv_i.0.weight" in state:
            x = torch.cat((x, h), 1)
            i, f, o = (torch.sigmoid(conv(f"conv_{gate}.0", x)) for gate in "ifo")
            g = torch.tanh(conv("conv_g.0", x))
            c = f * c + i * g
            h = o * torch.tanh(c)
            x = h
        for block in range(1, 6):
            if f"res_conv{block}.0.weight" not in state:
                block = 1
            branch = F.relu(conv(f"res_conv{block}.2", F.relu(conv(f"res_conv{block}.0", x))))
            x = F.relu(branch + x)
        x = conv("conv.0", x) + (rainy if residual else 0)
        outputs.append(x)
    return outputs


def network_of(variant, stages=6):
    """Return a network in float64 whose gates and branches are all active."""
    torch.manual_seed(0)
    network = PReNet(stages, **VARIANTS[variant]).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.2).add_(0.003)
    return network


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(19, 23), (1, 1), (1, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_stage_equals_the_literal_implementation(variant, size, memory_format):
    network = network_of(variant)
    rainy = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = literal(network.state_dict(), rainy, residual=variant != "PReNet_LSTM")
        stages = network.every_stage(rainy.contiguous(memory_format=memory_format))
        last = network(rainy)
    assert len(stages) == 6
    for ours, theirs in zip(stages, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    torch.testing.assert_close(last, expected[-1], atol=1e-10, rtol=0)
    assert (stages[1] - stages[0]).abs().max() > 1e-4  # stages differ, so their order is tested


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_the_literal_implementation(variant):
    network = network_of(variant, stages=3).train()
    state = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    rainy = torch.rand(1, 3, 9, 11, dtype=torch.float64)
    weight = torch.rand(3, 1, 3, 9, 11, dtype=torch.float64)
    (torch.stack(network.every_stage(rainy)) * weight).sum().backward()
    (torch.stack(literal(state, rainy, 3, variant != "PReNet_LSTM")) * weight).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_equal_the_published_ones(variant):
    assert sum(p.numel() for p in PReNet(**VARIANTS[variant]).parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_receptive_field_of_a_stage(variant):
    network = network_of(variant, stages=1)
    rainy = torch.rand(1, 3, 1, 41, dtype=torch.float64)
    touched = rainy.clone()
    touched[..., 20] += 0.5
    with torch.no_grad():
        moved = (network(touched) - network(rainy)).abs().amax(dim=(0, 1, 2)).nonzero().flatten()
    reach = 13 if VARIANTS[variant]["recurrent"] else 12
    assert (moved.min(), moved.max()) == (20 - reach, 20 + reach)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "PReNet_LSTM"])
def test_variant_of_a_state_dict(variant):
    state = PReNet(2, **VARIANTS[variant]).state_dict()
    assert variant_of(state) == variant
    assert variant_of({**state, "extra": torch.zeros(1)}) is None
    assert variant_of({**state, "conv.0.bias": torch.zeros(4)}) is None


@pytest.mark.parametrize("stages", [0, -1, 101, 10**9])
def test_number_of_stages_is_limited(stages):
    with pytest.raises(DerainError, match=f"stages {stages}"):
        PReNet(stages)


FOLDERS = {
    "Rain100H/PReNet6": ("PReNet", 6),
    "Rain100L/PReNet6_r": ("PReNet_r", 6),
    "Rain1400/PRN6": ("PRN", 6),
    "Rain100H/PRN6_r": ("PRN_r", 6),
    "mine/PReNet3": ("PReNet", 3),
    "Ablation/PReNet5_LSTM": ("PReNet_LSTM", 5),
    "Ablation/PReNet6_RecSSIM": ("PReNet_LSTM", 6),
    "Ablation/PReNet6_MSE": ("PReNet", 6),
    "RainHeavy/PReNet": ("PReNet", 6),
    "RainyLight/PReNet": ("PReNet", 6),
}


@pytest.fixture
def file_in(tmp_path):
    """Function that writes the authors' state dict of a variant into a folder."""

    def write(folder, variant, name="net_latest.pth"):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network_of(variant).float().state_dict(), path)
        return path

    return write


@pytest.mark.parametrize("folder", FOLDERS)
def test_authors_folders_determine_the_network(folder, file_in, caplog):
    variant, stages = FOLDERS[folder]
    path = file_in(folder, variant)
    module = catalog.load(path).module
    assert (module.hparams.variant, module.hparams.stages) == (variant, stages)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    rainy = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        expected = literal(module.network.state_dict(), rainy, stages, variant != "PReNet_LSTM")[-1]
        torch.testing.assert_close(module(rainy), expected, atol=1e-5, rtol=1e-5)


def test_warning_for_other_folders(file_in, caplog):
    module = catalog.load(file_in("downloads", "PReNet")).module
    assert (module.hparams.variant, module.hparams.stages) == ("PReNet", 6)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "6 stages" in warning
    assert "FILE:stages=N,variant=PReNet_LSTM" in warning


def test_options_after_the_file_name_take_precedence(file_in, caplog):
    path = file_in("Ablation/PReNet6", "PReNet")
    for name in (f"{path}:stages=5,variant=PReNet_LSTM", Path(f"{path}:variant=PReNet_LSTM,stages=5")):
        hyper = Restorer(name, device="cpu").method.hparams
        assert (hyper.variant, hyper.stages) == ("PReNet_LSTM", 5)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert catalog.locate(f"{path}:stages=5") == path


@pytest.mark.parametrize(
    "options", ["stages=0", "stages=101", "stages=x", "variant=PRN", "variant=no", "dim=3", "stages=4,dim=3"]
)
def test_invalid_options_after_the_file_name_are_refused(options, file_in):
    path = file_in("PReNet6", "PReNet")
    with pytest.raises(DerainError, match=options.split(",")[-1].split("=")[0]):
        catalog.load(f"{path}:{options}")


def test_options_of_files_with_metadata_are_refused(tmp_path):
    PReNetModule(stages=2).save_weights(tmp_path / "w.safetensors")
    with pytest.raises(DerainError, match=r"w\.safetensors:stages=4"):
        catalog.load(f"{tmp_path / 'w.safetensors'}:stages=4")
    torch.save(NAFNet(width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]).state_dict(), tmp_path / "n.pth")
    with pytest.raises(DerainError, match=r"n\.pth:stages=4"):
        catalog.load(f"{tmp_path / 'n.pth'}:stages=4")


def test_file_name_that_looks_like_options(file_in):
    path = file_in("PReNet6", "PReNet", "net.pth:stages=3")
    assert catalog.load(path).module.hparams.stages == 6


def test_authors_generator_of_real_rain_is_refused(file_in):
    for name in ("PReNet1.pth", "PReNet2.pth"):
        with pytest.raises(DerainError, match=name):
            catalog.load(file_in("real", "PReNet", name))


def test_output_is_float32_under_bfloat16_autocast():
    network = PReNet(2)
    rainy = torch.rand(1, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        derained = network(rainy)
    assert derained.dtype == torch.float32
    torch.testing.assert_close(derained, network(rainy), atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["PReNet", "PReNet_r"])
def test_authors_weights_equal_the_literal_implementation(variant, real_data, authors_weights):
    path = authors_weights / "Rain100L" / variant.replace("PReNet", "PReNet6") / "net_latest.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = PReNet(**VARIANTS[variant])
    network.load_state_dict(state, strict=True)
    image = read_rgb(real_data / "Rain100L" / "rainy" / "rain-001.png")[100:180, 200:320]
    rainy = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1) / 255)[None]
    with torch.no_grad():
        ours = network(rainy.contiguous(memory_format=torch.channels_last))
        theirs = literal({name: value.double() for name, value in state.items()}, rainy.double())[-1]
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    assert (theirs - rainy).abs().max() > 0.02  # rain was removed


RECDERAIN = {"matlab-y": (26.7990, 0.90211), "prenet": (26.7578, 0.90204)}


@pytest.mark.slow
def test_weights_of_recderain_restore_as_its_code(real_data):
    """BRN's authors trained PReNet too; derain recognises their files and reproduces their scores."""
    path = real_data.parent / "zoo" / "weights" / "prenet_recderain" / "RainHeavy" / "net_latest.pth"
    if not path.exists():
        pytest.skip(f"{path}, weights of the authors, is absent")
    module = catalog.load(path).module
    assert isinstance(module, PReNetModule)
    assert (module.hparams.variant, module.hparams.stages) == ("PReNet", 6)
    check_real_image(module, "Rain100H", 3, RECDERAIN)
