"""PReNet against its published form, written down literally from a state dict."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from derain.errors import DerainError
from derain.images import read_rgb
from derain.methods.prenet.network import VARIANTS, PReNet, variant_of

PARAMETERS = {"PReNet": 168_963, "PReNet_r": 94_979, "PRN": 95_107, "PRN_r": 21_123}


def literal(state, rainy, stages=6):
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
        x = conv("conv.0", x) + rainy
        outputs.append(x)
    return outputs


def network_of(variant, stages=6):
    """A network in float64 whose gates and branches all answer."""
    torch.manual_seed(0)
    network = PReNet(stages, **VARIANTS[variant]).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.2).add_(0.003)
    return network


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(19, 23), (1, 1), (1, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_stage_equals_the_literal_form(variant, size, memory_format):
    network = network_of(variant)
    rainy = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = literal(network.state_dict(), rainy)
        stages = network.every_stage(rainy.contiguous(memory_format=memory_format))
        last = network(rainy)
    assert len(stages) == 6
    for ours, theirs in zip(stages, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    torch.testing.assert_close(last, expected[-1], atol=1e-10, rtol=0)
    assert (stages[1] - stages[0]).abs().max() > 1e-4  # stages differ, so their order is tested


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_literal_form(variant):
    network = network_of(variant, stages=3).train()
    state = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    rainy = torch.rand(1, 3, 9, 11, dtype=torch.float64)
    weight = torch.rand(3, 1, 3, 9, 11, dtype=torch.float64)
    (torch.stack(network.every_stage(rainy)) * weight).sum().backward()
    (torch.stack(literal(state, rainy, stages=3)) * weight).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_published(variant):
    assert sum(p.numel() for p in PReNet(**VARIANTS[variant]).parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pixel_reaches_13_pixels_a_stage(variant):
    network = network_of(variant, stages=1)
    rainy = torch.rand(1, 3, 1, 41, dtype=torch.float64)
    touched = rainy.clone()
    touched[..., 20] += 0.5
    with torch.no_grad():
        moved = (network(touched) - network(rainy)).abs().amax(dim=(0, 1, 2)).nonzero().flatten()
    reach = 13 if VARIANTS[variant]["recurrent"] else 12
    assert (moved.min(), moved.max()) == (20 - reach, 20 + reach)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_names_its_variant(variant):
    state = PReNet(2, **VARIANTS[variant]).state_dict()
    assert variant_of(state) == variant
    assert variant_of({**state, "extra": torch.zeros(1)}) is None
    assert variant_of({**state, "conv.0.bias": torch.zeros(4)}) is None


def test_no_stage_is_refused():
    with pytest.raises(DerainError, match="PReNet with 0 stages restores nothing; give at least 1"):
        PReNet(0)


def test_bfloat16_autocast_adds_to_the_rainy_image_in_float32():
    network = PReNet(2)
    rainy = torch.rand(1, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        derained = network(rainy)
    assert derained.dtype == torch.float32
    torch.testing.assert_close(derained, network(rainy), atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["PReNet", "PReNet_r"])
def test_authors_weights_give_the_authors_image(variant, real_data, authors_weights):
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
