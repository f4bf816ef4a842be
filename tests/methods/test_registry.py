"""Methods from outside derain are found by their class paths, and broken ones are reported in one line."""

import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from derain import DerainModule, PReNetModule, Restorer
from derain.errors import DerainError
from derain.methods import catalog, registry
from derain.methods.interfaces import Explains
from tests.methods.test_contract import Plain

FILE = """
from tests.methods.test_contract import Plain


class Outer:
    class Inner(Plain):
        '''Nested in a class.'''


class Twin(Plain):
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with files of methods."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_named", {})
    monkeypatch.setattr(registry, "_reported", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    (tmp_path / "own_nested.py").write_text(FILE)
    (tmp_path / "own_twin.py").write_text(FILE)
    (tmp_path / "own_dependent.py").write_text("x = 1\nimport absent_package\n")
    (tmp_path / "own_broken.py").write_text("x = 1\n\n1 / 0\n")
    (tmp_path / "own_syntax.py").write_text("x = 1\nclass\n")
    yield tmp_path
    for module in set(sys.modules) - modules:
        if module.startswith("own_"):
            del sys.modules[module]


def announce(folder, monkeypatch, name, value):
    """Install a package that announces a method."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[derain.methods]\nx = {value}\n")
    monkeypatch.syspath_prepend(folder)


def test_nested_classes_are_imported(folder, tmp_path):
    method = catalog.use_method("own_nested.Outer.Inner")
    assert method.__qualname__ == "Outer.Inner"
    method().save_weights(tmp_path / "w.safetensors")
    assert type(catalog.load(tmp_path / "w.safetensors").module) is method


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("MyModule", ["MyModule"]),
        ("own_absent.MyModule", ["own_absent"]),
        ("own_nested.Absent", ["own_nested.py", "Absent"]),
        ("own_nested.Outer.Absent", ["own_nested.py", "Absent"]),
        ("own_dependent.MyModule", ["own_dependent.py, line 2", "absent_package"]),
        ("own_broken.MyModule", ["own_broken.py, line 3", "ZeroDivisionError"]),
        ("own_syntax.MyModule", ["own_syntax.py, line 2", "SyntaxError"]),
    ],
)
def test_classes_that_cannot_be_imported(name, parts):
    with pytest.raises(DerainError) as caught:
        registry.use_method(name, "model")
    for part in (f"model {name}", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("my_method" in str(caught.value)) == (name in {"MyModule", "own_absent.MyModule"})


def test_a_module_is_no_class(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses other types before derain does
    with pytest.raises(DerainError, match="PReNetModule"):
        Restorer("default", method=PReNetModule(stages=1), device="cpu")
    with pytest.raises(DerainError, match="PReNetModule"):
        Restorer(PReNetModule(stages=1), method=PReNetModule, device="cpu")


@pytest.mark.parametrize("reason", ["raise OSError('no driver')", "raise RuntimeError('no driver')", "no driver"])
def test_a_broken_package_stops_no_command(folder, monkeypatch, caplog, reason):
    (folder / "own_plugin.py").write_text(reason)
    announce(folder, monkeypatch, "own-plugin", "own_plugin:Broken")
    for _ in range(2):
        assert "PReNetModule" in [method.__name__ for method in catalog.methods()]
    assert len(caplog.records) == 1
    for part in ("own-plugin", "own_plugin:Broken"):
        assert part in caplog.text


def test_the_class_path_decides_between_classes_of_a_name(folder, monkeypatch):
    announce(folder, monkeypatch, "first", "own_nested:Twin")
    announce(folder, monkeypatch, "second", "own_twin:Twin")
    for origin in ("own_nested.Twin", "own_twin.Twin"):
        found = registry.find(Path("w"), {"method": "Twin", "class_path": origin})
        assert registry.class_path(found) == origin
    with pytest.raises(DerainError, match=r"own_nested\.Twin") as caught:
        registry.find(Path("w"), {"method": "Twin", "class_path": "moved.Twin"})
    assert "own_twin.Twin" in str(caught.value)
    named = registry.use_method("own_twin.Twin")
    assert registry.find(Path("w"), {"method": "Twin", "class_path": "moved.Twin"}) is named


def test_announced_nested_classes_are_found(folder, monkeypatch):
    announce(folder, monkeypatch, "nested", "own_nested:Outer.Inner")
    found = registry.find(Path("w"), {"method": "Inner", "class_path": "own_nested.Outer.Inner"})
    assert found.__qualname__ == "Outer.Inner"
    assert not registry.must_be_named(found)
    assert not registry.must_be_named(PReNetModule)
    assert registry.must_be_named(Plain)


def test_weights_of_a_class_in_a_function(tmp_path, caplog):
    class Local(Plain):
        pass

    file = tmp_path / "w.safetensors"
    Local().save_weights(file)
    assert "Local" in caplog.text
    with pytest.raises(DerainError, match=r"Local.*Restorer\(file, method=Local\)"):
        catalog.load(file)
    assert type(Restorer(file, method=Local, device="cpu").method) is Local


def test_a_named_method_that_is_not_used_is_reported(tmp_path, caplog):
    PReNetModule(stages=1).save_weights(tmp_path / "w.safetensors")
    catalog.load(tmp_path / "w.safetensors", Plain)
    assert "test_contract.Plain" in caplog.text
    caplog.clear()
    Plain().save_weights(tmp_path / "p.safetensors")
    catalog.load(tmp_path / "p.safetensors", Plain)
    assert not caplog.text


@pytest.mark.parametrize("name", ["perceive", "judged_by", "check", "take_route", "explain", "set_sampling"])
def test_names_without_effect_are_refused(name):
    with pytest.raises(DerainError, match=rf"Old\.{name}"):
        type("Old", (Plain,), {name: lambda self: None})


def test_explain_is_accepted_with_its_interface():
    assert issubclass(type("New", (Plain, Explains), {"explain": lambda self, rainy: rainy}), DerainModule)


class Frozen(Plain):
    """Builds a large network that its files do not contain."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.frozen = [torch.nn.Linear(10_000, 6_000, device="meta")]


def test_methods_may_build_networks_that_files_do_not_contain(tmp_path):
    Frozen().save_weights(tmp_path / "w.safetensors")
    assert type(catalog.load(tmp_path / "w.safetensors", Frozen).module) is Frozen
