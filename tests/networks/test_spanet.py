"""SPANet compared with recorded outputs of the authors' code."""

import pytest
import torch

import derain.export
from derain.errors import DerainError
from derain.export import SUFFIXES, export
from derain.methods.regression.module import RegressionModule
from derain.networks import spanet
from derain.networks.spanet import Recurrence, SPANet, scan, scan_by_doubling
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

TINY = {"dim": 4, "groups": 1}


@pytest.fixture(scope="module")
def golden():
    return Golden("spanet")


@pytest.fixture(scope="module")
def network(golden):
    network = SPANet(**SPANet.options_of(golden.shapes()))
    load(network, golden)
    return network


def test_outputs_equal_the_authors(network, golden):
    check_outputs(network, golden)


def test_gradients_equal_the_authors(network, golden):
    check_gradients(network, golden, names={"mask": "mask"})


def test_parameters(network, golden):
    check_parameters(network, golden)
    assert sum(parameter.numel() for parameter in network.parameters()) == 276_704


def test_recognition(golden):
    check_recognition(SPANet, "spanet")
    for options in ({"dim": 4, "groups": 1}, {"dim": 6, "groups": 3}):
        assert SPANet.options_of(published_state(SPANet(**options), golden)) == options


def test_any_size():
    check_sizes(SPANet(**TINY))


@pytest.mark.parametrize("options", [{"dim": 0}, {"groups": 0}])
def test_options_out_of_range(options):
    with pytest.raises(DerainError, match="0"):
        SPANet(**options)


def literal(x, unit, backwards, dim):
    """The recurrence of a direction, one row or column after the other."""
    rows = list(x.unbind(dim))[:: -1 if backwards else 1]
    weight, bias = unit.weight.view(-1, 1), unit.bias.view(-1, 1)
    hidden = [rows[0].clamp(min=0)]
    for row in rows[1:]:
        hidden.append((weight * hidden[-1] + bias + row).clamp(min=0))
    return torch.stack(hidden[:: -1 if backwards else 1], dim)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (7, 4)])
def test_recurrences_are_those_of_single_directions(size, gradients):
    torch.manual_seed(0)
    recurrence = Recurrence(3).double()
    with torch.no_grad():
        for parameter in recurrence.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = [
        literal(x, recurrence.up, True, 2),
        literal(x, recurrence.right, False, 3),
        literal(x, recurrence.down, False, 2),
        literal(x, recurrence.left, True, 3),
    ]
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(recurrence(x), torch.cat(expected, 1))


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("scale", [0.2, 1.0, 1.5])
def test_recurrences_of_graphs_equal_loops(steps, scale):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8, steps, 3, dtype=torch.float64)
    weight, bias = scale * torch.randn(2, 8, 1, dtype=torch.float64), torch.randn(2, 8, 1, dtype=torch.float64)
    with torch.no_grad():
        expected = scan(x.clone(), weight, bias)
    valid = expected < 1e9  # units with weights above 1 grow without limit
    assert valid.any()
    torch.testing.assert_close(scan_by_doubling(x, weight, bias)[valid], expected[valid])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_files_of_both_formats_restore_as_the_network(format, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(spanet, "DOUBLINGS", 5)  # sides of up to 32 pixels; every round takes time to export
    monkeypatch.setattr(derain.export, "EXAMPLE_SIZE", (21, 26))
    monkeypatch.setattr(derain.export, "SIZES", [(31, 17), (32, 29), (1, 1)])
    method = RegressionModule("SPANet", TINY)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "recurrence" in name:
                parameter.normal_(std=0.5)
    export(method, str(tmp_path / f"spanet{SUFFIXES[format]}"), format)  # compares the file with the method


def test_mask_is_1_where_any_channel_differs_by_a_grey_level():
    clean = torch.randint(256, (1, 3, 4, 4)) / 255
    rainy = clean.clone()
    rainy[0, 2, 1, 3] = (rainy[0, 2, 1, 3] * 255 + 1) / 255
    rainy[0, 0, 0, 0] += 1e-4
    targets = SPANet(**TINY).targets(rainy, clean, {})
    assert targets["derained"] is clean
    assert targets["mask"].shape == (1, 1, 4, 4)
    assert targets["mask"].nonzero().tolist() == [[0, 0, 1, 3]]
