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
