import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from derain.data.verify import verify
from derain.errors import DerainError
from derain.images import read_rgb
from tests.factories import add_rain, clean_image, make_set, photo, save

PHOTOS = {
    "train": ("astronaut", "coffee", "camera", "brick", "motorcycle_left"),
    "test": ("chelsea", "rocket", "grass", "motorcycle_right"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rain on photos, none of them twice: train/ and test/ with input/ and target/."""
    pytest.importorskip("skimage")
    root = tmp_path_factory.mktemp("verify") / "photos"
    for split, names in PHOTOS.items():
        for seed, name in enumerate(names):
            pixels = photo(name)
            scale = 240 / max(pixels.shape)
            size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
            write_pair(root / split, name, cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), seed)
    return root


def write_pair(folder, name, clean, seed, suffix=".png"):
    save(folder / f"target/{name}{suffix}", clean)
    save(folder / f"input/{name}{suffix}", add_rain(clean, seed))


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "photos"))


def wrong(root, **options):
    return [finding for finding in verify(root, **options)[1] if finding.level == "error"]


def test_nothing_is_found_in_a_clean_set(made):
    sets, findings = verify(made)
    assert [(str(one), len(one.matched.pairs)) for one in sets] == [("photos train", 5), ("photos test", 4)]
    assert findings == []


def test_a_lost_file_leaves_its_partner_unpaired(root):
    (root / "train/target/coffee.png").unlink()
    (found,) = wrong(root)
    assert (found.kind, found.files) == ("unpaired", (str(root / "train/input/coffee.png"),))


def test_a_set_with_too_few_pairs_is_told(tmp_path):
    make_set(tmp_path, "Rain12", "test", count=11)
    (found,) = wrong(tmp_path)
    assert (found.kind, found.detail) == ("count", "11 pairs, published are 12")


@pytest.mark.parametrize("side", ["input", "target"])
def test_a_truncated_file_is_told_by_its_name(root, side):
    path = root / f"test/{side}/rocket.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (found,) = wrong(root)
    assert (found.kind, found.files) == ("unreadable", (str(path),))


def test_a_file_that_is_no_image_is_told(root):
    (root / "test/input/rocket.png").write_text("not an image")
    (found,) = wrong(root)
    assert found.kind == "unreadable"
    assert "not an image" in found.detail


def test_a_pair_of_two_sizes_is_told(root):
    path = root / "train/input/camera.png"
    save(path, read_rgb(path)[:-1])
    (found,) = wrong(root)
    assert (found.kind, [Path(file).parent.name for file in found.files]) == ("size", ["input", "target"])
    assert "240x239 and 240x240" in found.detail


def test_two_files_for_one_place_are_told(root):
    save(root / "train/target/camera.jpg", read_rgb(root / "train/target/camera.png"))
    assert {found.kind for found in wrong(root)} == {"clash"}


def side_by_side(folder, swapped=()):
    names = (*PHOTOS["train"], "chelsea", "rocket", "motorcycle_right", "moon")
    for i, name in enumerate(names, 1):
        clean = cv2.resize(photo(name), (200, 160), interpolation=cv2.INTER_AREA)
        halves = [clean, add_rain(clean, i)]
        save(folder / f"test_syn/{i}.jpg", np.concatenate(halves[::-1] if i in swapped else halves, axis=1))
    return folder


def test_an_exchanged_pair_is_told_from_the_others(tmp_path):
    pytest.importorskip("skimage")
    folder = side_by_side(tmp_path / "Rain800", swapped={4})
    found = [one for one in wrong(folder) if one.kind != "count"]
    assert [(one.kind, one.files) for one in found] == [("swapped", (str(folder / "test_syn/4.jpg"),))]


def test_a_layout_of_the_other_order_is_told_once(tmp_path):
    pytest.importorskip("skimage")
    folder = side_by_side(tmp_path / "mine")
    found = [one for one in wrong(folder, layout="Rain800") if one.kind != "count"]
    assert found == []
    shutil.move(folder / "test_syn", folder / "test")
    (found,) = [one for one in wrong(folder, layout="Rain1200") if one.kind != "count"]
    assert (found.kind, found.files) == ("swapped", (str(folder),))
    assert "exchanged throughout, expected {n} (rainy left, clean right)" in found.detail


def test_exchanged_folders_are_told(root):
    for split in ("train", "test"):
        shutil.move(root / split / "input", root / split / "was")
        shutil.move(root / split / "target", root / split / "input")
        shutil.move(root / split / "was", root / split / "target")
    assert [(found.kind, found.set) for found in wrong(root)] == [
        ("swapped", "photos train"),
        ("swapped", "photos test"),
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p[:, ::-1], "flipped left to right"),
        (lambda p: p.transpose(1, 0, 2), "transposed"),
        (lambda p: p, "one background 2 times"),
    ],
)
def test_a_duplicate_is_told(root, change, told):
    for side in ("input", "target"):
        save(root / f"train/{side}/again.png", change(read_rgb(root / f"train/{side}/coffee.png")))
    (found,) = wrong(root)
    assert (found.kind, found.set) == ("duplicate", "photos train")
    assert {Path(file).name for file in found.files} == {"again.png", "coffee.png"}
    assert told in found.detail
    assert found.detail.endswith("the same rain")


def test_a_background_under_other_rain_is_wrong_in_a_test_set_only(root):
    for split, name in (("train", "coffee"), ("test", "chelsea")):
        write_pair(root / split, "again", read_rgb(root / split / f"target/{name}.png"), 99)
    (found,) = wrong(root)
    assert (found.kind, found.set) == ("duplicate", "photos test")
    notes = [one for one in verify(root)[1] if one.level == "note"]
    assert [(one.kind, one.set, one.detail) for one in notes] == [
        ("duplicate", "photos train", "one background 2 times, other rain"),
        ("backgrounds", "photos train", "6 images show 5 distinct backgrounds"),
        ("backgrounds", "photos test", "5 images show 4 distinct backgrounds"),
    ]


def leaked(root, name, change):
    clean = np.ascontiguousarray(change(read_rgb(root / f"test/target/{name}.png")))
    write_pair(root / "train", "leaked", clean, 99, ".jpg")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chelsea", lambda p: p[30:130, 40:200]),
        ("rocket", lambda p: p[::-1]),
        ("grass", lambda p: np.rot90(p[20:180, :160])),
        ("motorcycle_right", lambda p: p),
    ],
)
def test_a_leaked_jpeg_is_told_with_both_files(root, name, change):
    leaked(root, name, change)
    found = wrong(root)
    assert [(one.kind, one.set) for one in found] == [("leak", "photos test")]
    assert "leaked.jpg" in found[0].detail
    assert found[0].files == (str(root / f"test/target/{name}.png"), str(root / "train/target/leaked.jpg"))


def test_a_leak_between_two_folders_is_told(root, tmp_path):
    leaked(root, "rocket", lambda p: p[10:150, 40:220])
    shutil.move(root / "train", tmp_path / "train")
    shutil.move(root / "test", tmp_path / "test")
    assert wrong(tmp_path / "test") == []
    (found,) = wrong(tmp_path / "test", against=[tmp_path / "train"])
    assert [Path(file).name for file in found.files] == ["rocket.png", "leaked.jpg"]
    assert wrong(tmp_path / "train", against=[tmp_path / "test"]) == [found]


def test_only_the_set_itself_is_judged_not_what_it_is_compared_with(root, tmp_path):
    other = make_set(tmp_path, "folder", "test", count=3)
    (other / "input/1.png").unlink()
    assert wrong(root, against=[other]) == []


def test_rainy_photos_are_compared_with_clean_ones(root, tmp_path):
    save(tmp_path / "photos/real/1.png", add_rain(read_rgb(root / "train/target/coffee.png"), 5, share=0.03))
    save(tmp_path / "photos/real/2.png", add_rain(clean_image(1, (150, 200)), 5))
    (found,) = wrong(root / "train", against=[tmp_path / "photos/real"])
    assert (found.kind, [Path(file).name for file in found.files]) == ("leak", ["1.png", "coffee.png"])


def test_test_sets_may_share_backgrounds(tmp_path):
    make_set(tmp_path, "Rain100L", "test", count=3)
    make_set(tmp_path, "Rain100H", "test", count=4)
    sets, findings = verify(tmp_path)
    assert [one.name for one in sets] == ["Rain100L", "Rain100H"]
    assert {(one.kind, one.level) for one in findings} == {("count", "error"), ("shared", "note")}
    (shared,) = [one for one in findings if one.kind == "shared"]
    assert shared.detail == "3 of its images share their background with 3 of Rain100H test"
    assert len(shared.files) == 6


def test_many_rains_on_one_clean_image_are_no_duplicates(tmp_path):
    make_set(tmp_path, "Rain1400", "train", count=3)
    assert {one.kind for one in verify(tmp_path)[1]} == {"count"}


def test_findings_come_in_one_order(root):
    leaked(root, "rocket", lambda p: p[10:150, 40:220])
    (root / "train/target/coffee.png").unlink()
    first, second = verify(root)[1], verify(root)[1]
    assert first == second
    assert [one.kind for one in first] == ["unpaired", "leak"]
    assert set(first[0].as_json()) == {"kind", "files", "detail", "level", "set"}


def test_refusals(tmp_path):
    with pytest.raises(DerainError, match="absent: no such folder"):
        verify(tmp_path / "absent")


@pytest.mark.slow
def test_what_is_known_of_the_real_sets_comes_out(real_data):
    _, findings = verify(real_data)
    told = {(one.set, one.detail) for one in findings if one.kind in {"backgrounds", "shared"}}
    assert ("Rain100L test", "100 images show 91 distinct backgrounds") in told
    assert ("Rain100L test", "100 of its images share their background with 100 of Rain100H test") in told
    leaks = [one for one in findings if one.kind == "leak" and one.set == "Rain100L test"]
    assert len(leaks) == 10
    assert all("Rain800 train" in one.detail for one in leaks)
    assert {Path(one.files[0]).stem for one in leaks} == {
        f"norain-{number:03d}" for number in (8, 37, 40, 42, 44, 45, 47, 70, 88, 93)
    }
    assert not [one for one in findings if one.kind in {"unreadable", "size", "unpaired", "clash", "count"}]
    assert not [one for one in findings if one.kind == "swapped" and one.level == "error"]
    assert len([one for one in findings if one.kind == "swapped"]) <= 8  # 1 % of 800 correct pairs


@pytest.mark.parametrize("stated", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_reported(root, stated):
    path = root / "test/input/rocket.png"
    exif = Image.Exif()
    exif[0x0112] = stated
    Image.fromarray(read_rgb(path)).save(path, exif=exif)
    (found,) = [finding for finding in verify(root)[1] if finding.kind == "exif"]
    assert (found.files, found.level) == ((str(path),), "warning")
    assert str(stated) in found.detail
