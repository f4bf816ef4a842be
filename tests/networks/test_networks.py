"""Every network: a method that keeps the contract, with a recipe, a small preset and a page."""

from pathlib import Path

import pytest
import torch
import yaml

import derain.methods
from derain.errors import DerainError
from derain.export import export
from derain.methods.regression.module import find_network, network_paths
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


def arguments(name):
    """Return the hyper-parameters of a small network with the loss of its recipe."""
    recipe = TINY[name]
    chosen = {"network": name, "network_options": recipe["network_options"], "schedule": "constant"}
    chosen |= {"loss": recipe["loss"]} if "loss" in recipe else {}
    return chosen | {"learning_rate": 1e-3} | ({"encoder_epochs": 0} if "encoder_epochs" in recipe else {})


def method_class(name):
    """Return the class that trains a network by its recipe."""
    return getattr(derain.methods, TINY[name]["class"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_networks_keep_the_contract(name):
    check_method(method_class(name), can_export=False, **arguments(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_graphs_equal_networks_or_are_refused_in_one_line(name, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    method = method_class(name)(**arguments(name)).eval()
    if name in NOT_EXPORTED:
        with pytest.raises(DerainError, match=r"^[^\n]+$"):
            export(method, tmp_path / "m.onnx")
    else:
        export(method, tmp_path / "m.onnx")  # compares the graph with the method


NOT_EXPORTED = {"HCTFFN"}  # its attention over runs of pixels needs more memory than derain grants a graph


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_a_recipe_and_a_page(name):
    assert name in {recipe["network"] for recipe in RECIPES.values()}
    assert name in TINY
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/methods").glob("*.md"))
    module = network_paths()[name].rpartition(".")[0]
    assert module.rpartition(".")[2] in pages


def test_every_recorded_system_has_one_network():
    files = sorted(folder().glob("*.npz"))
    assert len(files) >= 27
    for file in files:
        state = Golden(file.stem).state()
        found = [name for name in NAMES if find_network(name).options_of(state) is not None]
        assert len(found) == 1, (file.stem, found)
