import numpy as np
import pytest
import torch
from PIL import Image

from derain.cli import main
from derain.commands.restore import plan
from derain.errors import DerainError
from derain.images import read_photo, read_rgb, write_image
from derain.methods import PReNetModule, weights


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    weights.save(PReNetModule(stages=1), path)
    return str(path)


@pytest.fixture
def photo(tmp_path, rng):
    path = tmp_path / "rainy.png"
    write_image(path, rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    return path


def restored_by_hand(path, file):
    rgb = torch.from_numpy(read_photo(path).rgb).permute(2, 0, 1)[None]
    with torch.no_grad():
        derained = weights.load(weights.Path(file)).module(rgb).clamp(0, 1)
    return derained[0].permute(1, 2, 0).mul(255).round().numpy()


def test_a_photo(photo, file, tmp_path):
    assert main(["restore", str(photo), str(tmp_path / "out.png"), "--weights", file, "--device", "cpu"]) == 0
    assert np.abs(read_rgb(tmp_path / "out.png") - restored_by_hand(photo, file)).max() <= 1


def test_a_photo_into_a_folder(photo, file, tmp_path):
    assert main(["restore", str(photo), str(tmp_path / "out"), "--weights", file]) == 0
    assert (tmp_path / "out" / "rainy.png").is_file()


def test_a_folder_keeps_names_and_skips_what_exists(photo, file, tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "deep/b.jpg"):
        write_image(source / name, read_rgb(photo))
    arguments = ["restore", str(source), str(target), "--weights", file]
    assert main(arguments) == 0
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*.*")) == ["a.png", "deep/b.jpg"]
    (target / "a.png").write_bytes(b"kept")
    assert main(arguments) == 0
    assert "kept 2 that exist" in capsys.readouterr().err
    assert (target / "a.png").read_bytes() == b"kept"
    assert main([*arguments, "--overwrite"]) == 0
    assert (target / "a.png").read_bytes() != b"kept"


def test_a_glob(photo, file, tmp_path):
    write_image(tmp_path / "other.jpg", read_rgb(photo))
    assert main(["restore", str(tmp_path / "*.png"), str(tmp_path / "out"), "--weights", file]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["rainy.png"]


def test_broken_files_are_told_at_the_end_and_the_others_done(photo, file, tmp_path, capsys):
    source = tmp_path / "in"
    write_image(source / "good.png", read_rgb(photo))
    (source / "bad.png").write_bytes(photo.read_bytes()[:200])
    (source / "worse.jpg").write_text("no image")
    assert main(["restore", str(source), str(tmp_path / "out"), "--weights", file]) == 2
    error = capsys.readouterr().err
    assert "bad.png" in error
    assert "worse.jpg" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_any_mode(photo, file, tmp_path, mode):
    with Image.open(photo) as image:
        converted = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("L").convert("LA")
    suffix = ".tif" if mode == "CMYK" else ".png"
    converted.save(tmp_path / f"in{suffix}")
    target = tmp_path / "out.png"
    assert main(["restore", str(tmp_path / f"in{suffix}"), str(target), "--weights", file]) == 0
    with Image.open(target) as image:
        assert image.size == (30, 20)
        assert image.mode == {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)


def test_one_pixel(file, tmp_path):
    write_image(tmp_path / "a.png", np.full((1, 1, 3), 90, np.uint8))
    assert main(["restore", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--weights", file, "--ensemble"]) == 0
    assert read_rgb(tmp_path / "b.png").shape == (1, 1, 3)


def test_the_comparison_shows_both(photo, file, tmp_path):
    arguments = ["restore", str(photo), str(tmp_path / "out.png"), "--weights", file, "--compare"]
    assert main(arguments) == 0
    picture = read_rgb(tmp_path / "out.png-compare.png")
    assert picture.shape[1] > 2 * 30
    assert picture.shape[0] > 20


def test_plan_refuses_what_would_lose_something(photo, tmp_path):
    with pytest.raises(DerainError, match="is the input itself"):
        plan(str(photo), photo)
    with pytest.raises(DerainError, match="no such photo"):
        plan(str(tmp_path / "absent.png"), tmp_path / "o.png")
    for folder in ("one", "two"):
        write_image(tmp_path / "in" / folder / "same.png", read_rgb(photo))
    with pytest.raises(DerainError, match="give a folder"):
        plan(str(tmp_path / "in"), tmp_path / "out.png")
    with pytest.raises(DerainError, match=r"several photos are named same\.png"):
        plan(str(tmp_path / "in" / "*" / "*.png"), tmp_path / "out")


def test_an_output_folder_inside_the_input_is_not_restored_again(photo, tmp_path):
    write_image(tmp_path / "in" / "a.png", read_rgb(photo))
    write_image(tmp_path / "in" / "out" / "a.png", read_rgb(photo))
    assert list(plan(str(tmp_path / "in"), tmp_path / "in" / "out")) == [tmp_path / "in" / "a.png"]


def test_refusals_take_one_line(photo, file, tmp_path, capsys):
    target = str(tmp_path / "out.png")
    for arguments, told in (
        (["restore", str(photo), target, "--weights", "absent"], "absent: no such file of weights"),
        (["restore", str(photo), target, "--weights", str(photo)], "rainy.png"),
        (["restore", str(photo), target, "--weights", file, "--tile", "many"], "--tile many"),
        (["restore", str(photo), target, "--weights", file, "--device", "tpu"], "--device tpu"),
        (["restore", str(photo), str(tmp_path / "out.gif"), "--weights", file], "out.gif"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("derain: error:")
        assert told in error
    write_image(tmp_path / "out.png", read_rgb(photo))
    assert main(["restore", str(photo), target, "--weights", file]) == 2
    assert "--overwrite" in capsys.readouterr().err
