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
            scale = 160 / max(pixels.shape)
            size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
            write_pair(root / split, name, cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), seed)
    return root


def write_pair(folder, name, clean, seed, suffix=".png"):
    save(folder / f"target/{name}{suffix}", clean)
    save(folder / f"input/{name}{suffix}", add_rain(clean, seed))


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "photos"))


def errors(root, **options):
    return [finding for finding in verify(root, **options)[1] if finding.level == "error"]


def test_a_correct_set_has_no_findings(made):
    sets, findings = verify(made)
    assert [(str(split), len(split.files.pairs)) for split in sets] == [("photos train", 5), ("photos test", 4)]
    assert findings == []


def test_a_file_without_partner_is_reported(root):
    (root / "train/target/coffee.png").unlink()
    (found,) = errors(root)
    assert (found.kind, found.files) == ("unpaired", (str(root / "train/input/coffee.png"),))


def test_missing_pairs_are_reported(tmp_path):
    make_set(tmp_path, "Rain12", "test", count=11)
    (found,) = errors(tmp_path)
    assert (found.kind, found.detail) == ("count", "11 pairs; the published set has 12")


@pytest.mark.parametrize("side", ["input", "target"])
def test_a_truncated_file_is_reported(root, side):
    path = root / f"test/{side}/rocket.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (found,) = errors(root)
    assert (found.kind, found.files) == ("unreadable", (str(path),))


def test_a_file_that_is_not_an_image_is_reported(root):
    (root / "test/input/rocket.png").write_text("not an image")
    (found,) = errors(root)
    assert found.kind == "unreadable"
    assert "image" in found.detail


def test_a_pair_of_two_sizes_is_reported(root):
    path = root / "train/input/camera.png"
    save(path, read_rgb(path)[:-1])
    (found,) = errors(root)
    assert (found.kind, [Path(file).parent.name for file in found.files]) == ("size", ["input", "target"])
    assert "160x159 and 160x160" in found.detail


def test_two_files_for_one_pair_are_reported(root):
    save(root / "train/target/camera.jpg", read_rgb(root / "train/target/camera.png"))
    assert {found.kind for found in errors(root)} == {"clash"}


def side_by_side(folder, swapped=()):
    names = (*PHOTOS["train"], "chelsea", "rocket", "motorcycle_right", "moon")
    for i, name in enumerate(names, 1):
        clean = cv2.resize(photo(name), (200, 160), interpolation=cv2.INTER_AREA)
        halves = [clean, add_rain(clean, i)]
        save(folder / f"test_syn/{i}.jpg", np.concatenate(halves[::-1] if i in swapped else halves, axis=1))
    return folder


def test_a_swapped_pair_is_reported(tmp_path):
    pytest.importorskip("skimage")
    folder = side_by_side(tmp_path / "Rain800", swapped={4})
    found = [finding for finding in errors(folder) if finding.kind != "count"]
    assert [(finding.kind, finding.files) for finding in found] == [("swapped", (str(folder / "test_syn/4.jpg"),))]


def test_a_layout_of_the_wrong_order_is_reported_once(tmp_path):
    pytest.importorskip("skimage")
    folder = side_by_side(tmp_path / "mine")
    found = [finding for finding in errors(folder, layout="Rain800") if finding.kind != "count"]
    assert found == []
    shutil.move(folder / "test_syn", folder / "test")
    (found,) = [finding for finding in errors(folder, layout="Rain1200") if finding.kind != "count"]
    assert (found.kind, found.files) == ("swapped", (str(folder),))
    assert "{n} (rainy left, clean right)" in found.detail


def test_swapped_folders_are_reported(root):
    for split in ("train", "test"):
        shutil.move(root / split / "input", root / split / "was")
        shutil.move(root / split / "target", root / split / "input")
        shutil.move(root / split / "was", root / split / "target")
    assert [(found.kind, found.set) for found in errors(root)] == [
        ("swapped", "photos train"),
        ("swapped", "photos test"),
    ]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda p: p[:, ::-1], "flipped left to right"),
        (lambda p: p.transpose(1, 0, 2), "transposed"),
        (lambda p: p, "one background 2 times"),
    ],
)
def test_a_duplicate_is_reported(root, change, detail):
    for side in ("input", "target"):
        save(root / f"train/{side}/again.png", change(read_rgb(root / f"train/{side}/coffee.png")))
    (found,) = errors(root)
    assert (found.kind, found.set) == ("duplicate", "photos train")
    assert {Path(file).name for file in found.files} == {"again.png", "coffee.png"}
    assert detail in found.detail
    assert found.detail.endswith("the same rain")


def test_a_repeated_background_is_an_error_in_a_test_set_only(root):
    for split, name in (("train", "coffee"), ("test", "chelsea")):
        write_pair(root / split, "again", read_rgb(root / split / f"target/{name}.png"), 99)
    (found,) = errors(root)
    assert (found.kind, found.set) == ("duplicate", "photos test")
    notes = [finding for finding in verify(root)[1] if finding.level == "note"]
    assert [(finding.kind, finding.set, finding.detail) for finding in notes] == [
        ("duplicate", "photos train", "one background 2 times, different rain"),
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
def test_a_leaked_jpeg_is_reported_with_both_files(root, name, change):
    leaked(root, name, change)
    found = errors(root)
    assert [(finding.kind, finding.set) for finding in found] == [("leak", "photos test")]
    assert "leaked.jpg" in found[0].detail
    assert found[0].files == (str(root / f"test/target/{name}.png"), str(root / "train/target/leaked.jpg"))


def test_a_leak_between_two_folders_is_reported(root, tmp_path):
    leaked(root, "rocket", lambda p: p[10:150, 40:220])
    shutil.move(root / "train", tmp_path / "train")
    shutil.move(root / "test", tmp_path / "test")
    assert errors(tmp_path / "test") == []
    (found,) = errors(tmp_path / "test", against=[tmp_path / "train"])
    assert [Path(file).name for file in found.files] == ["rocket.png", "leaked.jpg"]
    assert errors(tmp_path / "train", against=[tmp_path / "test"]) == [found]


def test_findings_are_about_the_set_itself_alone(root, tmp_path):
    other = make_set(tmp_path, "folder", "test", count=3)
    (other / "input/1.png").unlink()
    assert errors(root, against=[other]) == []


def test_rainy_photos_are_compared_with_clean_ones(root, tmp_path):
    save(tmp_path / "photos/real/1.png", add_rain(read_rgb(root / "train/target/coffee.png"), 5, share=0.03))
    save(tmp_path / "photos/real/2.png", add_rain(clean_image(1, (150, 200)), 5))
    (found,) = errors(root / "train", against=[tmp_path / "photos/real"])
    assert (found.kind, [Path(file).name for file in found.files]) == ("leak", ["1.png", "coffee.png"])


def test_test_sets_may_share_backgrounds(tmp_path):
    make_set(tmp_path, "Rain100L", "test", count=3)
    make_set(tmp_path, "Rain100H", "test", count=4)
    sets, findings = verify(tmp_path)
    assert [split.name for split in sets] == ["Rain100L", "Rain100H"]
    assert {(finding.kind, finding.level) for finding in findings} == {("count", "error"), ("shared", "note")}
    (shared,) = [finding for finding in findings if finding.kind == "shared"]
    assert shared.detail == "3 of its images share their background with 3 of Rain100H test"
    assert len(shared.files) == 6


def test_several_rains_on_one_clean_image_are_not_duplicates(tmp_path):
    make_set(tmp_path, "Rain1400", "train", count=3)
    assert {finding.kind for finding in verify(tmp_path)[1]} == {"count"}


def test_frames_of_a_sequence_are_not_duplicates(tmp_path):
    for sequence, seed in (("a", 1), ("b", 2), ("c", 1)):
        for frame in range(3):
            for side, pixels in (
                ("target", clean_image(seed)),
                ("input", add_rain(clean_image(seed), 10 * seed + frame)),
            ):
                save(tmp_path / f"test/{side}/{sequence}/{frame}.png", pixels)
    findings = verify(tmp_path, layout="video")[1]
    assert [(found.kind, [Path(file).parent.name for file in found.files]) for found in findings[:1]] == [
        ("duplicate", ["a", "c"])
    ]
    assert [(found.kind, found.detail) for found in findings[1:]] == [
        ("backgrounds", "3 first frames of sequences show 2 distinct backgrounds")
    ]


def test_findings_come_in_one_order(root):
    leaked(root, "rocket", lambda p: p[10:150, 40:220])
    (root / "train/target/coffee.png").unlink()
    first, second = verify(root)[1], verify(root)[1]
    assert first == second
    assert [finding.kind for finding in first] == ["unpaired", "leak"]
    assert set(first[0].as_json()) == {"kind", "files", "detail", "level", "set"}


def test_a_missing_folder_is_rejected(tmp_path):
    with pytest.raises(DerainError, match="absent: "):
        verify(tmp_path / "absent")


LEAKED = {
    8: [150],
    37: [185],
    40: [52],
    42: [81],
    44: [458],
    45: [166],
    47: [150],
    70: [237, 305, 376],
    88: [13, 261],
    93: [12, 181],
}
"""Numbers of the training images of Rain800 with the background of an image of Rain100L, by its number."""


@pytest.mark.slow
def test_known_findings_in_the_real_sets(real_data, tmp_path):
    """Of the 700 training images of Rain800, those with a background of Rain100L and every fifth are compared."""
    trained_on = {number for numbers in LEAKED.values() for number in numbers} | {*range(1, 701, 5)}
    files = [file for name in ("Rain100L", "Rain100H", "Rain800/test_syn") for file in (real_data / name).rglob("*.*")]
    files += [real_data / f"Rain800/training/{number}.jpg" for number in trained_on]
    for file in files:
        link = tmp_path / file.relative_to(real_data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    _, findings = verify(tmp_path)
    details = {(finding.set, finding.detail) for finding in findings if finding.kind in {"backgrounds", "shared"}}
    assert ("Rain100L test", "100 images show 91 distinct backgrounds") in details
    assert ("Rain100L test", "100 of its images share their background with 100 of Rain100H test") in details
    leaks = [finding for finding in findings if finding.kind == "leak" and finding.set == "Rain100L test"]
    assert all("Rain800 train" in finding.detail for finding in leaks)
    stems = [[Path(file).stem for file in leak.files] for leak in leaks]
    found = {test: sorted(map(int, training)) for test, *training in stems}
    assert found == {f"norain-{number:03d}": numbers for number, numbers in LEAKED.items()}
    assert not [finding for finding in findings if finding.kind in {"unreadable", "size", "unpaired", "clash"}]
    assert not [finding for finding in findings if finding.kind == "swapped" and finding.level == "error"]
    assert len([finding for finding in findings if finding.kind == "swapped"]) <= 3  # 1 % of 250 correct pairs


@pytest.mark.parametrize("stated", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_reported(root, stated):
    path = root / "test/input/rocket.png"
    exif = Image.Exif()
    exif[0x0112] = stated
    Image.fromarray(read_rgb(path)).save(path, exif=exif)
    (found,) = [finding for finding in verify(root)[1] if finding.kind == "exif"]
    assert (found.files, found.level) == ((str(path),), "warning")
    assert str(stated) in found.detail
