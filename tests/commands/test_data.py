import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import pytest

from derain.cli import main
from derain.commands.data import sets_table, synthesize_set
from derain.data.layouts import LAYOUTS
from derain.data.rain import PRESETS, Rain
from derain.images import read_rgb, write_image
from derain.options import parse_docstring
from tests.factories import make_set


def test_list_has_every_set_and_counts_those_in_the_data_root(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    make_set(tmp_path, "Rain800", "train", count=3)
    make_set(tmp_path, "Rain12", "test", count=2)
    assert main(["data", "list", "--format", "json"]) == 0
    sets = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(sets) == set(LAYOUTS)
    assert sets["Rain800"]["found"] == {"train": 3}
    assert sets["Rain12"]["found"] == {"test": 2}
    assert sets["Rain200H"]["found"] == {}
    assert [source["kind"] for source in sets["Rain13K"]["fetch"]] == ["hub", "form"]
    for entry in sets.values():
        if entry["counts"]:
            assert entry["source"].startswith("https://")
            assert entry["citation"]
    assert main(["data", "list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in LAYOUTS)


def test_the_list_of_data_sets_in_the_documentation_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs/data-sets.md").read_text(encoding="utf-8")
    assert page.endswith(sets_table(LAYOUTS).markdown())


def test_list_without_a_data_root_names_the_variable(capsys, monkeypatch):
    monkeypatch.delenv("DERAIN_DATA", raising=False)
    assert main(["data", "list"]) == 0
    assert "DERAIN_DATA" in capsys.readouterr().out


def test_verify_exits_with_0_for_a_clean_set_and_1_for_a_broken_one(tmp_path, capsys):
    folder = make_set(tmp_path, "folder", "train", count=4)
    assert main(["data", "verify", str(folder)]) == 0
    assert "no errors" in capsys.readouterr().out
    broken = next(path for path in sorted(folder.rglob("*.png")))
    broken.write_bytes(broken.read_bytes()[:100])
    assert main(["data", "verify", str(folder), "--format", "json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert any(finding["kind"] == "unreadable" and finding["files"] == [str(broken)] for finding in findings)
    assert all({"kind", "files", "detail"} <= set(finding) for finding in findings)
    assert main(["data", "verify", str(folder)]) == 1
    table = capsys.readouterr().out
    assert broken.name in table
    assert "1 errors" in table


def test_verify_against_another_set_finds_the_leak(tmp_path, capsys):
    train = make_set(tmp_path / "a", "folder", "train", count=3)
    test = make_set(tmp_path / "b", "folder", "test", count=3, seed=40)
    image = next(path for path in sorted(train.rglob("*.png")) if "target" in str(path))
    for path in test.rglob("*.png"):
        if path.name == image.name:
            partner = {"target": image, "input": image.parent.parent / "input" / image.name}[path.parent.name]
            shutil.copy(partner, path)
    assert main(["data", "verify", str(train), "--against", str(test), "--format", "json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [finding["kind"] for finding in findings if finding["level"] == "error"] == ["leak"]


def test_verify_accepts_names_of_sets_in_the_data_root(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, "Rain12", "test", count=12)
    make_set(tmp_path, "RainTrainL", "train", count=3, seed=70)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    assert main(["data", "verify", "Rain12", "--against", "RainTrainL"]) == 0, capsys.readouterr().out
    assert f"in {tmp_path}/Rain12" in capsys.readouterr().out
    assert main(["data", "verify", "Rain100H"]) == 2
    assert "Rain100H: " in capsys.readouterr().err


def test_synthesize_writes_a_set_that_verify_accepts(tmp_path, capsys):
    pytest.importorskip("skimage")
    assert main(["data", "photos", str(tmp_path / "photos")]) == 0
    arguments = ["data", "synthesize", str(tmp_path / "photos/test"), str(tmp_path / "set"), "--preset", "light"]
    assert main([*arguments, "--density", "0.1", "--angle", "-5", "5"]) == 0
    record = json.loads((tmp_path / "set/rain.json").read_text())
    assert record["lower_limits"]["density"] == record["upper_limits"]["density"] == 0.1
    assert (record["lower_limits"]["angle"], record["upper_limits"]["angle"]) == (-5, 5)
    assert (tmp_path / "set/contact_sheet.png").is_file()
    capsys.readouterr()
    assert main(["data", "verify", str(tmp_path / "set")]) == 0, capsys.readouterr().out
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_broken_photos_are_skipped_and_reported(tmp_path, capsys, rng):
    write_image(tmp_path / "clean/a.png", rng.integers(0, 256, (40, 50, 3), dtype="uint8"))
    (tmp_path / "clean/b.png").write_text("no image")
    assert main(["data", "synthesize", str(tmp_path / "clean"), str(tmp_path / "set")]) == 2
    assert "b.png" in capsys.readouterr().err
    assert read_rgb(tmp_path / "set/input/a.png").shape == (40, 50, 3)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["verify", "absent"], "absent"),
        (["list", "--root", "absent"], "absent"),
        (["synthesize", "absent", "out"], "absent"),
        (["verify", ".", "--layout", "Rain99"], "Rain99"),
        (["synthesize", ".", "out", "--density", "9"], "density 9"),
        (["synthesize", ".", "out", "--density", "0.1", "0.2", "0.3"], "--density: 3"),
    ],
)
def test_bad_input_gives_one_line(tmp_path, capsys, monkeypatch, arguments, value):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("derain: error:")
    assert value in error
    assert error.count("\n") == 1


def test_options_of_synthesize_are_the_parameters_of_the_rain():
    parameters = inspect.signature(synthesize_set).parameters
    descriptions = parse_docstring(synthesize_set)[1]
    for field in dataclasses.fields(Rain):
        low, high = field.metadata["limits"]
        assert f", {low:g} to {high:g}" in descriptions[field.name]
        assert field.type.__name__ in str(parameters[field.name].annotation)
    assert set(PRESETS) == {"light", "medium", "heavy"}
