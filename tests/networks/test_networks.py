"""Every network: a method that keeps the contract, with a recipe, a small preset and a page."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

import derain.export
import derain.methods
from derain.errors import DerainError
from derain.export import export
from derain.methods.catalog import load, split_options
from derain.methods.regression.module import RegressionModule, find_network, network_paths
from derain.testing import check_method
from tests.networks.goldens import Golden, folder

ROOT = Path(__file__).parents[2]
MODELS = {
    path.stem: yaml.safe_load(path.read_text())["model"] for path in (ROOT / "experiments/methods").glob("*.yaml")
}
RECIPES = {
    stem: {"network": model["class_path"].removesuffix("Module"), **model["init_args"], "class": model["class_path"]}
    for stem, model in MODELS.items()
    if "network" in model.get("init_args", {}) or model["class_path"] == "AirNetModule"
}
"""Hyper-parameters by the name of the file."""
TINY = {recipe["network"]: recipe for stem, recipe in RECIPES.items() if stem.endswith("-tiny")}
TINY["Restormer"] = {
    "class": "RegressionModule",
    "network": "Restormer",
    "network_options": {"dim": 8, "blocks": [1, 1, 1, 1], "refinement": 1, "bias": True, "bias_free_norm": True},
}
NAMES = list(network_paths())
SMALLER = {
    "NeRDRain": {"blocks": [0, 1, 0]},
    "DRSformer": {"blocks": [0, 1, 0, 0]},
    "PromptIR": {"blocks": [0, 1, 0, 0], "refinement": 0},
    "AMIR": {"blocks": [0, 1, 0, 0], "refinement": 0},
    "Restormer": {"blocks": [0, 1, 0, 0], "refinement": 0},
    "SPANet": {"groups": 1},
    "MPRNet": {"width": 4, "growth": 2, "refinement_growth": 2, "refinement_blocks": 1},
    "NAFNet": {"width": 8, "encoder_blocks": [1], "decoder_blocks": [1]},
    "RCDNet": {"blocks": 1},
    "DCSFN": {"blocks": 1, "convolutions": 1},
    "BRN": {"iterations": 2},
    "VRGNet": {"iterations": 2},
    "SwinIR": {"blocks": [2], "heads": [3]},
}
"""Options that repeat the layers of a small network less often: every operator takes time."""
ELSEWHERE = {"AirNet", "RESCAN", "SSIDKD", "Syn2Real"}
"""Networks of the methods in test_contract.py and test_onnx_model.py, with the same checks."""


def arguments(name):
    """Return the hyper-parameters of a small network with the loss of its recipe."""
    recipe = TINY[name]
    options = {**recipe["network_options"], **SMALLER.get(name, {})}
    chosen = {"network": name, "network_options": options, "schedule": "constant"}
    chosen |= {"loss": recipe["loss"]} if "loss" in recipe else {}
    return chosen | {"learning_rate": 1e-3} | ({"encoder_epochs": 0} if "encoder_epochs" in recipe else {})


def method_class(name):
    """Return the class that trains a network by its recipe."""
    return getattr(derain.methods, TINY[name]["class"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_networks_keep_the_contract(name):
    check_method(method_class(name), can_export=False, **arguments(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*ELSEWHERE, "SPANet"}])
def test_graphs_equal_networks_or_are_refused_in_one_line(name, tmp_path, monkeypatch):
    """The graph of SPANet is tested with recurrences of all directions, in test_spanet.py."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    method = method_class(name)(**arguments(name)).eval()
    if name in NOT_EXPORTED:
        with pytest.raises(DerainError, match=r"^[^\n]+$"):
            export(method, tmp_path / "m.onnx")
    else:
        monkeypatch.setattr(derain.export, "SIZES", [(37, 31), (1, 1), (101, 77)])
        export(method, tmp_path / "m.onnx")  # compares the graph with the method


NOT_EXPORTED = {"HCTFFN"}  # its attention over runs of pixels needs more memory than derain grants a graph


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_a_recipe_and_a_page(name):
    assert name in {recipe["network"] for recipe in RECIPES.values()}
    assert name in TINY
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/methods").glob("*.md"))
    module = network_paths()[name].rpartition(".")[0]
    assert module.rpartition(".")[2] in pages


ASSUMED = {
    "AMIR": {"selected": 2},
    "BRN": {"iterations": 8},
    "HCTFFN": {"repeats": 3},
    "NeRDRain": {"window": 256},
    "NLEDN": {"grids": [8, 4, 2]},
    "RESCAN": {"iterations": 4},
    "RPDNet": {"iterations": 6},
    "TransWeather": {"heads": [1, 2, 4, 4], "intra_heads": [1, 2, 2], "decoder_heads": 8},
    "VRGNet": {"iterations": 6},
}
"""What is assumed of the authors' files that do not determine it."""
UNRECORDED = {
    "BRN": {"rain_blocks"},  # others do not fit the tensors
    "NAFNet": {"kernel_size", "unshuffle", "refinement_layers"},  # derain's own; others do not fit the tensors
    "SSIDKD": {"repeats"},  # others do not fit the tensors
    "SwinIR": {"drop_path"},  # in training only
    "TransWeather": {"drop"},  # in training only
}
"""Further arguments that `options_of` does not return, but that cannot be wrong."""


def test_options_that_files_do_not_record_are_listed():
    classes = {name: find_network(name) for name in NAMES}
    listed = {name: kind.published_options for name, kind in classes.items() if kind.published_options}
    assert listed == {name: frozenset(options) for name, options in ASSUMED.items()}
    assert RegressionModule.published_options == frozenset().union(*listed.values())


@pytest.mark.parametrize("name", ASSUMED)
def test_what_is_assumed_is_one_warning_in_the_form_of_the_option(name, caplog):
    path, network, expected = Path("downloads/some.pth"), find_network(name), ASSUMED[name]
    assert {option: _listed(value) for option, value in network.assume(path, {}).items()} == expected
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "\n" not in record.getMessage()
    assert str(path) in record.getMessage()
    (options,) = re.findall(r"FILE(:\S+);", record.getMessage())
    assert split_options(f"{path}{options}") == (str(path), expected)
    caplog.clear()
    assert network.assume(path, expected) == expected
    assert caplog.records == []
    first, *others = expected
    network.assume(path, {first: expected[first]})
    assert len(caplog.records) == (1 if others else 0)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def test_options_behind_the_file_name_are_used(tmp_path, caplog):
    torch.save(Golden("nledn").state(), tmp_path / "net.pth")
    default, _ = load(tmp_path / "net.pth")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    module, _ = load(f"{tmp_path}/net.pth:grids=4-2-1")
    assert len(caplog.records) == 1
    rainy = torch.rand(1, 3, 32, 32)
    direct = find_network("NLEDN")(grids=(4, 2, 1))
    direct.load_state_dict(module.network.state_dict())
    with torch.no_grad():
        assert torch.equal(module(rainy), direct.eval()(rainy))
        assert not torch.equal(module(rainy), default(rainy))
    for options in ("iterations=4", "grids=4-2", "grids=4", "grids=many"):
        with pytest.raises(DerainError, match=r"net\.pth"):
            load(f"{tmp_path}/net.pth:{options}")


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(DerainError, match="heads 3"):
        find_network("TransWeather")(heads=(1, 2, 3, 4))


def test_every_recorded_system_has_one_network_and_determines_its_options():
    files = sorted(folder().glob("*.npz"))
    assert len(files) >= 27
    for file in files:
        state = Golden(file.stem).shapes()
        options = {name: find_network(name).options_of(state) for name in NAMES}
        found = [name for name in NAMES if options[name] is not None]
        assert len(found) == 1, (file.stem, found)
        (name,), network = found, find_network(found[0])
        undetermined = set(inspect.signature(network).parameters) - set(options[name]) - network.published_options
        assert undetermined == UNRECORDED.get(name, set()), file.stem
