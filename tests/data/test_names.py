"""Names of files: bytes that are not UTF-8, composed and decomposed accents, and outputs of one name."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from derain.cli import main
from derain.data.cache import fingerprint
from derain.data.captions import Caption, match_captions
from derain.data.layouts import LAYOUTS, Files, Layout
from derain.data.name_matching import pair_files
from derain.data.pairs import Pair, find_pairs
from derain.data.rain import synthesize
from derain.errors import DerainError
from derain.folders import check_outputs
from derain.images import read_rgb
from derain.methods import PReNetModule
from tests.factories import add_rain, clean_image, save

LATIN = os.fsdecode(b"caf\xe9")
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def pair_set(folder, rainy, clean, count=2):
    """Pairs whose names end in a number."""
    for index in range(count):
        save(folder / f"input/{rainy}{index}.png", add_rain(clean_image(index), index))
        save(folder / f"target/{clean}{index}.png", clean_image(index))
    return folder


def derain(*arguments, **variables):
    """Runs the command with a locale that refuses what it cannot encode."""
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8:strict", **variables}
    done = subprocess.run(
        [sys.executable, "-m", "derain", *arguments], env=environment, capture_output=True, check=False
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


# Bytes that are not UTF-8.


def test_a_set_of_such_names_is_found_and_has_a_fingerprint(tmp_path):
    pairs = find_pairs(pair_set(tmp_path / "s", LATIN, LATIN), "test").pairs
    assert [os.fsencode(pair.name) for pair in pairs] == [b"caf\xe90", b"caf\xe91"]
    other = [
        Pair(os.fsdecode(b"caf\xe8" + name[-1:]), p.rainy, p.clean)
        for p in pairs
        for name in [p.name.encode("utf-8", "surrogateescape")]
    ]
    assert fingerprint(pairs) != fingerprint(other)


@pytest.mark.parametrize("form", ["table", "json", "csv", "markdown", "latex"])
@pytest.mark.parametrize("where", ["file", "utf-8:strict", "ascii:strict"])
def test_scores_of_such_names_are_written(tmp_path, form, where):
    folder = pair_set(tmp_path / LATIN, LATIN, LATIN)
    output = tmp_path / "scores"
    arguments = ["score", str(folder / "input"), str(folder / "target"), "--lpips", "none", "--format", form]
    done = derain(
        *arguments,
        *(["--out", str(output)] if where == "file" else []),
        **({} if where == "file" else {"PYTHONIOENCODING": where}),
    )
    assert done.returncode == 0, done.stderr
    text = (output.read_bytes() if where == "file" else done.stdout).decode()
    if form == "json":
        assert [image["name"] for image in json.loads(text)[0]["images"]] == [f"{LATIN}0", f"{LATIN}1"]
    elif form == "csv":
        assert [row["name"] for row in csv.DictReader(text.splitlines())] == ["caf\\udce90", "caf\\udce91"]


@pytest.mark.parametrize("name", [LATIN, "[/red]", "[bold]"])
@pytest.mark.parametrize("options", [[], ["--format", "json"]])
def test_findings_on_such_names_are_reported(tmp_path, name, options):
    folder = pair_set(tmp_path / name, name, name)
    file = folder / f"input/{name}1.png"
    file.write_bytes(b"no image")
    done = derain("data", "verify", str(folder), *options)
    assert done.returncode == 1
    if options:
        findings = json.loads(done.stdout)
        assert [finding["files"] for finding in findings if finding["kind"] == "unreadable"] == [[str(file)]]
    else:
        assert Path(name).name.encode(errors="backslashreplace") + b"1.png" in done.stdout


def test_rain_is_added_to_photos_of_such_names(tmp_path):
    save(tmp_path / f"photos/{LATIN}.png", clean_image(0))
    assert synthesize(tmp_path / "photos", tmp_path / "set") == []
    assert list(json.loads((tmp_path / "set/rain.json").read_text())["images"]) == [LATIN]
    assert [pair.name for pair in find_pairs(tmp_path / "set", "train").pairs] == [LATIN]


@pytest.mark.slow
def test_methods_are_tested_and_predict_images_of_such_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair_set(tmp_path / LATIN, LATIN, LATIN)
    PReNetModule(stages=1).save_weights(tmp_path / "w.safetensors")
    common = ["--weights", "w.safetensors", "--trainer.default_root_dir", "runs", "--trainer.accelerator", "cpu"]
    model = ["--model", "PReNetModule"]
    assert main(["test", *model, *common, "--data.test", str(tmp_path / LATIN)]) == 0
    assert (tmp_path / "runs/test-1/images.csv").read_bytes().count(b"caf\\udce9") == 2
    assert main(["predict", *model, *common, "--data.predict", str(tmp_path / LATIN / "input")]) == 0
    assert (tmp_path / f"runs/predict-1/images/{LATIN}1.png").is_file()


# Accents.


@pytest.mark.parametrize(("rainy", "clean"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_pair_however_accents_are_written(tmp_path, rainy, clean):
    found = find_pairs(pair_set(tmp_path, rainy, clean), "test")
    assert [(pair.rainy.name, pair.clean.name) for pair in found.pairs] == [
        (f"{rainy}{index}.png", f"{clean}{index}.png") for index in range(2)
    ]


def test_two_spellings_of_one_name_are_rejected(tmp_path):
    pair_set(tmp_path, COMPOSED, COMPOSED)
    save(tmp_path / f"target/{DECOMPOSED}0.png", clean_image(7))
    with pytest.raises(DerainError) as caught:
        find_pairs(tmp_path, "test")
    assert all(f"target/{name}0.png" in str(caught.value) for name in (COMPOSED, DECOMPOSED))


def test_captions_are_found_however_accents_are_written(tmp_path):
    pairs = [Pair("1", tmp_path / COMPOSED / "1.png")]
    caption = Caption("a street", "rainy")
    assert match_captions(pairs, {tmp_path / "t.tsv": {f"{DECOMPOSED}/1.png": caption}}) == [caption]


# One name for two things.


def test_a_rainy_image_with_two_clean_images_is_rejected(tmp_path):
    """The name of rain 1 on `a` is also the name of another photo."""
    for name in ("a_rain1", "b_rain1"):
        save(tmp_path / f"input/{name}.png", clean_image(0))
    for name in ("a", "b", "a_rain1"):
        save(tmp_path / f"target/{name}.png", clean_image(0))
    with pytest.raises(DerainError) as caught:
        find_pairs(tmp_path, "test")
    assert all(f"target/{name}.png" in str(caught.value) for name in ("a", "a_rain1"))


def test_synthesize_rejects_names_that_would_be_ambiguous(tmp_path):
    for name in ("a", "a_rain1"):
        save(tmp_path / f"photos/{name}.png", clean_image(0))
    with pytest.raises(DerainError, match=r"a_rain1\.png: .* a\.png"):
        synthesize(tmp_path / "photos", tmp_path / "set", per_image=2)
    assert not (tmp_path / "set").exists()


def test_pairs_of_another_version_in_the_folder_are_noted(tmp_path):
    for rainy, clean in (("rainy/rain-1", "norain-1"), ("input/1", "target/1"), ("input/2", "target/2")):
        save(tmp_path / f"Rain100L/{rainy}.png", clean_image(0))
        save(tmp_path / f"Rain100L/{clean}.png", clean_image(0))
    found = find_pairs(tmp_path / "Rain100L", "test")
    assert [pair.name for pair in found.pairs] == ["rain-1"]
    assert any("2 further pairs of files input/{name} with target/{name}" in note for note in found.notes)


def test_a_clean_file_that_the_rainy_pattern_matches_is_not_rainy(tmp_path, monkeypatch):
    files = Files("(?:no)?rain-{n}", "norain-{n}")
    monkeypatch.setitem(LAYOUTS, "both", Layout("", {"test": (files,)}))
    found = pair_files("both", "test", tmp_path, ["norain-1.png", "norain-2.png", "rain-1.png", "rain-3.png"])
    assert [(rainy.name, clean.name) for _, rainy, clean in found.pairs] == [("rain-1.png", "norain-1.png")]
    assert [file.name for file in found.unpaired] == ["norain-2.png", "rain-3.png"]
    assert found.clashes == ()


def test_photos_named_like_masks_are_restored(tmp_path):
    for name in ("streak-1", "rain_mask/2", "3"):
        save(tmp_path / f"{name}.png", clean_image(0))
    assert [pair.name for pair in find_pairs(tmp_path, "predict").pairs] == ["2", "3", "streak-1"]


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """Predicts images with a tiny method; returns the exit code and the files that it wrote."""
    monkeypatch.chdir(tmp_path)
    PReNetModule(stages=1).save_weights(tmp_path / "w.safetensors")

    def run(*folders):
        common = ["--weights", "w.safetensors", "--trainer.default_root_dir", "runs", "--trainer.accelerator", "cpu"]
        sets = f"[{', '.join(str(folder) for folder in folders)}]"
        code = main(["predict", "--model", "PReNetModule", *common, "--data.predict", sets])
        images = Path("runs/predict-1/images")
        return code, sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))

    return run


def test_folders_of_one_name_do_not_overwrite_each_other(predict, tmp_path):
    for index, folder in enumerate(("x/photos", "y/photos", "z")):
        save(tmp_path / f"{folder}/1.png", clean_image(index, (20, 30 + index)))
    assert predict("x/photos", "y/photos", "z") == (0, ["x/photos/1.png", "y/photos/1.png", "z/1.png"])
    assert read_rgb(Path("runs/predict-1/images/y/photos/1.png")).shape == (20, 31, 3)


def test_images_of_one_stem_do_not_overwrite_each_other(predict, tmp_path):
    for name in ("a.png", "a.bmp"):
        save(tmp_path / f"photos/{name}", clean_image(0))
    assert predict("photos") == (0, ["a.bmp.png", "a.png.png"])


def test_a_folder_given_twice_is_rejected_for_prediction(predict, tmp_path, capsys):
    save(tmp_path / "photos/1.png", clean_image(0))
    (tmp_path / "link").mkdir()
    (tmp_path / "link/photos").symlink_to(tmp_path / "photos")
    for again in ("photos", "link/photos"):
        assert predict("photos", again) == (2, [])
        assert "photos/1" in capsys.readouterr().err


def test_outputs_that_overwrite_each_other_are_rejected():
    check_outputs([(Path("a.png"), "a"), (Path("b/a.png"), "b")])
    for first, second in (("a.png", "a.png"), ("a.png", "a.png/b.png"), ("a.png/b.png", "a.png")):
        with pytest.raises(DerainError, match=r"a\.png: .*one.*two|a\.png: .*two.*one"):
            check_outputs([(Path(first), "one"), (Path(second), "two")])


def test_names_that_are_equal_on_some_file_systems_are_made_longer(tmp_path):
    for name in ("one/A.png", "two/a.png", f"one/{COMPOSED}.png", f"two/{DECOMPOSED}.png"):
        save(tmp_path / name, clean_image(0))
    names = [pair.name for pair in find_pairs(tmp_path, "predict").pairs]
    assert names == ["one/A", f"one/{COMPOSED}", "two/a", f"two/{DECOMPOSED}"]
