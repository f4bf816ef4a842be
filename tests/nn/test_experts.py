"""The mixture of experts against the plain form of its papers, layer by layer."""

import pytest
import torch
import torch.nn.functional as F

from derain.networks.base import translate_name
from derain.nn.experts import PUBLISHED_NAMES, ExpertCompensator
from tests.networks.goldens import Golden
from tests.nn.references import with_random_parameters


def plain(x, state, prefix=""):
    """Compute the compensator with one convolution after the other, on ``(b, c, h, w)``."""
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    c = x.shape[1]
    hidden = x.mean((2, 3)) @ state["gate.0.weight"].T + state["gate.0.bias"]
    scores = hidden.clamp(min=0) @ state["gate.2.weight"].T + state["gate.2.bias"]
    x = F.conv2d(x, state["preprocess.weight"]).clamp(min=0)
    for step in range(4):
        own = {
            name.removeprefix(f"steps.{step}.experts."): tensor
            for name, tensor in state.items()
            if name.startswith(f"steps.{step}.experts.")
        }
        outputs = []
        for index, kernel in enumerate((1, 3, 5, 7)):
            y = F.conv2d(x, own[f"{index}.depthwise.weight"], padding=kernel // 2, groups=c)
            y = F.conv2d(y, own[f"{index}.pointwise.weight"]).clamp(min=0)
            y = F.conv2d(y, own[f"{index}.depthwise2.weight"], padding=kernel // 2, groups=c)
            outputs.append(F.conv2d(y, own[f"{index}.pointwise2.weight"]))
        for index, kernel in enumerate((3, 5, 7), 4):
            y = F.conv2d(x, own[f"{index}.depthwise.weight"], padding=kernel - 1, dilation=2, groups=c)
            outputs.append(F.conv2d(y, own[f"{index}.pointwise.weight"]))
        ones = torch.ones(c, 1, 3, 3, dtype=x.dtype)
        outputs.append(F.conv2d(x, ones, padding=1, groups=c) / F.conv2d(torch.ones_like(x), ones, padding=1, groups=c))
        weights = scores[:, 8 * step : 8 * step + 8].softmax(1)
        weighted = [output * weights[:, index, None, None, None] for index, output in enumerate(outputs)]
        joined = F.conv2d(torch.cat(weighted, dim=1), state[f"steps.{step}.join.weight"])
        x = (x + joined.clamp(min=0)).clamp(min=0)
    return x


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (17, 12)])
def test_it_equals_its_plain_form(size):
    compensator = with_random_parameters(ExpertCompensator(6))
    x = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x, compensator.state_dict())
        assert expected.std() > 0.01
        torch.testing.assert_close(compensator(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected, atol=1e-12, rtol=0)


def test_its_gradients_are_those_of_the_plain_form():
    compensator = with_random_parameters(ExpertCompensator(4))
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    compensator(x.permute(0, 2, 3, 1)).square().sum().backward()
    state = {name: tensor.detach().requires_grad_() for name, tensor in compensator.state_dict().items()}
    plain(x, state).square().sum().backward()
    for name, parameter in compensator.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=name)


@pytest.mark.parametrize(
    ("system", "prefix", "channels"),
    [("drsformer", "encoder_level0.", 48), ("drsformer", "refinement.", 96), ("hct_ffn", "sub3.", 32)],
)
def test_the_authors_tensors_fit_in_name_and_shape(system, prefix, channels):
    state = {
        translate_name(name, PUBLISHED_NAMES).removeprefix(prefix): tensor
        for name, tensor in Golden(system).state().items()
        if name.startswith(f"{prefix}layers.")
    }
    ExpertCompensator(channels).load_state_dict(state, strict=True)
