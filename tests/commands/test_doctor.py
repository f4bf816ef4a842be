import sys
from importlib.machinery import ModuleSpec

import pytest

from derain.cli import main
from derain.commands import doctor
from derain.commands.doctor import version_mismatch


def test_no_problems(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    code = main(["doctor"])
    report = capsys.readouterr().out
    assert "torch" in report
    assert "cache" in report
    assert code == 0, report


def test_problems_are_reported(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "absent"))
    monkeypatch.setattr(
        doctor,
        "installed_version",
        lambda package: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get(package, "1.0"),
    )
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "torchvision 0.28.0" in report
    assert f"DERAIN_DATA={tmp_path / 'absent'}" in report.replace("\n", "")


class Broken:
    """Finder of a package whose import fails."""

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
def test_a_package_that_cannot_be_imported_is_reported_beside_the_rest(capsys, monkeypatch, package, error):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(package, error), *sys.meta_path])
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    row, line = (line for line in report.splitlines() if f"{package} cannot be imported" in line)
    assert "imports" in row
    for text in (row, line):
        assert f"({type(error).__name__}: {error})" in text
    assert "weights in ./runs" in report
    assert "devices" not in report


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
def test_torchvision_must_fit_torch(torch, vision, fits):
    assert (version_mismatch(torch, vision) is None) == fits
