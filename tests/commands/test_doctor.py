import sys
from importlib.machinery import ModuleSpec

import pytest

from derain.cli import main
from derain.commands import doctor
from derain.commands.doctor import vision_problem


def test_all_is_well(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    code = main(["doctor"])
    told = capsys.readouterr().out
    assert "torch" in told
    assert "cache" in told
    assert code == 0, told


def test_problems_are_told_with_a_remedy(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "absent"))
    monkeypatch.setattr(
        doctor,
        "version",
        lambda package: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get(package, "1.0"),
    )
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "different builds" in told
    assert "is no folder" in told


class Broken:
    """Finds a package whose import fails."""

    def __init__(self, name, error):
        self.name, self.error = name, error

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == self.name else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise self.error


@pytest.mark.parametrize(
    ("package", "error"),
    [
        ("torch", OSError("libcudart.so.13: cannot open [shared] object file")),
        ("torch", ImportError("cannot import name '_C'")),
        ("torchvision", RuntimeError("operator torchvision::nms does not exist")),
        ("lightning", ImportError("cannot import name 'Trainer'")),
        ("derain.restoration", ModuleNotFoundError("No module named 'safetensors'")),
    ],
)
def test_a_package_that_cannot_be_imported_is_told_and_the_rest_too(capsys, monkeypatch, package, error):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(package, error), *sys.meta_path])
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    row, line = (line for line in told.splitlines() if f"{package} cannot be imported" in line)
    assert "imports" in row
    for place in (row, line):
        assert f"({type(error).__name__}: {error}): install derain again" in place
    assert "weights in ./runs" in told
    assert "devices" not in told


@pytest.mark.parametrize(
    ("torch", "vision", "fits"),
    [
        ("2.13.0", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cu130", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0", False),
        ("2.12.0", "0.28.0", False),
        ("2.13.0", None, True),
    ],
)
def test_torchvision_must_belong_to_torch(torch, vision, fits):
    assert (vision_problem(torch, vision) is None) == fits
