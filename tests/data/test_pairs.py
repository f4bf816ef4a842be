import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from derain.data import pairs as module
from derain.data.layouts import LAYOUTS
from derain.data.pairs import Pair, find_pairs, read_clean, split_halves
from derain.errors import DerainError
from tests.factories import add_rain, make_set, save
from tests.factories import clean_image as picture


def test_a_pair_is_read_from_two_files(tmp_path):
    clean = picture(0, (20, 30))
    save(tmp_path / "r.png", add_rain(clean, 1))
    save(tmp_path / "c.png", clean)
    pair = Pair("r", tmp_path / "r.png", tmp_path / "c.png")
    rainy, read = pair.read()
    assert np.array_equal(read, clean)
    assert np.array_equal(rainy, add_rain(clean, 1))
    assert pickle.loads(pickle.dumps(pair)) == pair
    assert np.array_equal(read_clean(pair), clean)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_pair_is_read_from_two_halves(tmp_path, side, odd):
    clean = picture(0, (20, 30))
    rainy = add_rain(clean, 1)
    both = [clean, rainy] if side == "left" else [rainy, clean]
    save(tmp_path / "1.png", np.concatenate([both[0], np.zeros((20, odd, 3), np.uint8), both[1]], axis=1))
    pair = Pair("1", tmp_path / "1.png", tmp_path / "1.png", side)
    read_rainy, clean_half = pair.read()
    assert np.array_equal(read_rainy, rainy)
    assert np.array_equal(clean_half, clean)
    assert np.array_equal(read_clean(pair), clean)
    assert Pair("1", tmp_path / "1.png", None, side).read()[1] is None


def test_an_image_one_pixel_wide_has_no_halves(tmp_path):
    with pytest.raises(DerainError, match="1 pixel"):
        split_halves(np.zeros((4, 1, 3), np.uint8))
    file = tmp_path / "1.png"
    save(file, np.zeros((4, 1, 3), np.uint8))
    with pytest.raises(DerainError, match=f"^{re.escape(str(file))}: .*1 pixel"):
        Pair("1", file, file, "left").read()


def test_a_pair_of_two_sizes_is_rejected(tmp_path):
    save(tmp_path / "r.png", picture(0, (20, 30)))
    save(tmp_path / "c.png", picture(0, (20, 31)))
    with pytest.raises(DerainError, match=r"r\.png: .*30x20.*31x20"):
        Pair("r", tmp_path / "r.png", tmp_path / "c.png").read()


def test_pairs_are_found_by_key_not_by_position(tmp_path):
    folder = make_set(tmp_path, "Rain100L", "test", count=12, size=(16, 24))
    (folder / "norain-003.png").unlink()
    (folder / "rainy" / "rain-007.png").unlink()
    found = find_pairs("Rain100L", "test", data_root=tmp_path)
    assert len(found.pairs) == 10
    assert all(pair.rainy.stem[-3:] == pair.clean.stem[-3:] for pair in found.pairs)
    assert any("partner: 2" in note for note in found.notes)
    assert any({"10", "100"} <= set(re.findall(r"\d+", note)) for note in found.notes)


def test_leading_zeros_are_ignored_and_numbers_sort_naturally(tmp_path):
    for i in (1, 2, 10):
        save(tmp_path / f"norain-{i}.png", picture(i, (8, 9)))
        save(tmp_path / f"rainy/rain-{i:03d}.png", picture(i, (8, 9)))
    found = find_pairs(f"Rain100L:{tmp_path}", "test")
    assert [(pair.rainy.name, pair.clean.name) for pair in found.pairs] == [
        ("rain-001.png", "norain-1.png"),
        ("rain-002.png", "norain-2.png"),
        ("rain-010.png", "norain-10.png"),
    ]


def test_masks_and_streaks_are_ignored(tmp_path):
    folder = make_set(tmp_path, "RainTrainL", "train", count=3, size=(8, 9))
    for i in range(1, 4):
        save(folder / f"rainregion-{i}.png", picture(i, (8, 9)))
        save(folder / f"rainstreak-{i}.png", picture(i, (8, 9)))
    found = find_pairs("RainTrainL", "train", data_root=tmp_path)
    assert [pair.name for pair in found.pairs] == ["rain-1", "rain-2", "rain-3"]


def test_one_clean_image_has_many_rainy_ones(tmp_path):
    make_set(tmp_path, "Rain1400", "train", count=2, size=(8, 9))
    pairs = find_pairs("Rain1400", "train", data_root=tmp_path).pairs
    assert [pair.clean.stem for pair in pairs] == ["1"] * 3 + ["2"] * 3
    for name in ("a", "b"):
        save(tmp_path / f"own/target/{name}.png", picture(0, (8, 9)))
        for number in (1, 2):
            save(tmp_path / f"own/input/{name}_rain{number}.png", picture(0, (8, 9)))
    assert [pair.clean.stem for pair in find_pairs(tmp_path / "own", "train").pairs] == ["a", "a", "b", "b"]


def test_names_are_unique_if_file_names_repeat(tmp_path):
    make_set(tmp_path, "Rain1200", "train", count=6, size=(8, 9))
    names = [pair.name for pair in find_pairs("Rain1200", "train", data_root=tmp_path).pairs]
    assert "Rain_Heavy/train2018new/0" in names
    assert len(set(names)) == 6


@pytest.mark.parametrize("variant", range(4))
def test_a_plain_folder_is_detected_and_reported(tmp_path, variant):
    folder = make_set(tmp_path, "folder", "test", count=3, size=(8, 9), variant=variant)
    found = find_pairs(folder, "test")
    assert (found.layout, found.name, len(found.pairs)) == ("folder", "folder", 3)
    assert any(note.startswith("layout folder, ") for note in found.notes)


def test_a_split_folder_has_priority_over_the_root(tmp_path):
    for split in ("train", "test"):
        made = make_set(tmp_path / split, "folder", "test", count=2 if split == "train" else 3, size=(8, 9))
        shutil.copytree(made, tmp_path / "set" / split)
    assert len(find_pairs(tmp_path / "set", "train").pairs) == 2
    assert len(find_pairs(tmp_path / "set", "test").pairs) == 3


def test_set_folders_are_found_in_any_case_and_depth(tmp_path):
    made = make_set(tmp_path, "Rain12", "test", count=2, size=(8, 9))
    (tmp_path / "deep/er").mkdir(parents=True)
    made.rename(tmp_path / "deep/er/RAIN12")
    found = find_pairs("rain12", "test", data_root=tmp_path)
    assert found.root == tmp_path / "deep/er/RAIN12"
    assert find_pairs("Rain12", "test", data_root=found.root).pairs == found.pairs  # the root may be the set


def test_the_environment_sets_the_data_root(tmp_path, monkeypatch):
    make_set(tmp_path, "Rain12", "test", count=2, size=(8, 9))
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path))
    assert len(find_pairs("Rain12", "test").pairs) == 2
    monkeypatch.chdir("/")
    assert len(find_pairs("folder:Rain12", "test").pairs) == 2  # a path below the data root
    monkeypatch.delenv("DERAIN_DATA")
    with pytest.raises(DerainError, match=r"Rain12: .*DERAIN_DATA"):
        find_pairs("Rain12", "test")


def test_prediction_returns_rainy_images_only(tmp_path):
    make_set(tmp_path, "Rain800", "predict", count=2, size=(8, 9))
    make_set(tmp_path, "Rain100L", "test", count=2, size=(8, 9))
    photos = make_set(tmp_path, "images", "predict", count=3, size=(8, 9))
    for spec, layout, count in [("Rain800", "Rain800", 2), ("Rain100L", "Rain100L", 2), (photos, "images", 3)]:
        found = find_pairs(spec, "predict", data_root=tmp_path)
        assert (found.layout, len(found.pairs)) == (layout, count)
        for pair in found.pairs:
            rainy, clean = pair.read()
            assert clean is None
            assert rainy.shape == (8, 9, 3)
    assert all(
        pair.rainy.parent.name == "rainy" for pair in find_pairs("Rain100L", "predict", data_root=tmp_path).pairs
    )


def test_side_by_side_files_of_unknown_order_are_ambiguous(tmp_path):
    made = make_set(tmp_path, "Rain800", "test", count=3, size=(40, 60))
    (made / "test_syn").rename(tmp_path / "test")
    (tmp_path / "set").mkdir()
    (tmp_path / "test").rename(tmp_path / "set/test")
    with pytest.raises(DerainError, match=r"Rain800:.*clean left.* or Rain1200:.*clean right"):
        find_pairs(tmp_path / "set", "test")
    assert find_pairs(f"Rain1200:{tmp_path / 'set'}", "test").pairs[0].clean_side == "right"


def test_a_folder_of_single_photos_is_not_detected_as_side_by_side(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", picture(i, (40, 60)))
    with pytest.raises(DerainError, match=r"4 images; .*input/\{name\} with"):
        find_pairs(tmp_path, "test")


def test_two_files_for_one_pair_are_rejected(tmp_path):
    folder = make_set(tmp_path, "folder", "test", count=2, size=(8, 9))
    save(folder / "target/1.jpg", picture(0, (8, 9)))
    with pytest.raises(DerainError, match=r"1\.png: .*1\.jpg"):
        find_pairs(folder, "test")


def test_the_error_for_missing_data_names_folder_source_and_files(tmp_path):
    with pytest.raises(DerainError) as caught:
        find_pairs("Rain1400", "train", data_root=tmp_path)
    for part in (
        "Rain1400",
        str(tmp_path),
        LAYOUTS["Rain1400"].source,
        "rainy_image/{n}_{version} with ground_truth/{n}",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_error_for_unexpected_files_lists_the_contents(tmp_path):
    save(tmp_path / "Rain800/photos/1.jpg", picture(0, (8, 18)))
    with pytest.raises(DerainError, match=r"Rain800: .*folders: photos; .*training/"):
        find_pairs("Rain800", "train", data_root=tmp_path)


def test_two_folders_of_one_set_are_rejected(tmp_path):
    for parent in ("a", "b"):
        make_set(tmp_path / parent, "Rain12", "test", count=1, size=(8, 9))
    with pytest.raises(DerainError, match=r"Rain12: .*a/Rain12 and .*b/Rain12"):
        find_pairs("Rain12", "test", data_root=tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Rain100L", "Rain100L .*train.*see RainTrainL"),
        ("", "Rain100L"),
        ("absent", "absent: "),
        ("Rain800:absent", "absent: "),
    ],
)
def test_missing_and_unnamed_sets_are_rejected(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DerainError, match=message):
        find_pairs(spec, "train", data_root=tmp_path)
    with pytest.raises(DerainError, match=r"Rain800: .*nowhere.*ID-CGAN"):
        find_pairs("Rain800", "train", data_root=Path("nowhere"))


def test_strict_rain_train_h_excludes_the_backgrounds_of_the_test_set(tmp_path):
    folder = make_set(tmp_path, "RainTrainH-full", "train", count=6, size=(48, 64), seed=0)
    make_set(tmp_path, "Rain100H", "test", count=2, size=(48, 64), seed=3)  # pictures 3 and 4: rain-4 and rain-5
    rotated = np.ascontiguousarray(np.rot90(picture(0, (48, 64)))[:, ::-1])  # the test set has rain-1 transposed
    save(tmp_path / "Rain100H/norain-003.png", rotated)
    save(tmp_path / "Rain100H/rainy/rain-003.png", add_rain(rotated, 77))
    strict = find_pairs("RainTrainH", "train", data_root=tmp_path)
    assert [pair.name for pair in strict.pairs] == ["rain-2", "rain-3", "rain-6"]
    assert any("3 of 6 pairs" in note and "Rain100H" in note for note in strict.notes)
    assert len(find_pairs("RainTrainH-full", "train", data_root=tmp_path).pairs) == 6
    assert [pair.name for pair in find_pairs(folder, "train", data_root=tmp_path).pairs] == [
        "rain-2",
        "rain-3",
        "rain-6",
    ]


def test_backgrounds_of_strict_rain_train_h_are_compared_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    make_set(tmp_path, "RainTrainH-full", "train", count=6, size=(48, 64), seed=0)
    make_set(tmp_path, "Rain100H", "test", count=2, size=(48, 64), seed=3)
    read, original = [], module.read_clean
    monkeypatch.setattr(module, "read_clean", lambda pair: read.append(pair.name) or original(pair))

    def remaining():
        read.clear()
        return [pair.name for pair in find_pairs("RainTrainH", "train", data_root=tmp_path).pairs]

    assert remaining() == ["rain-1", "rain-2", "rain-3", "rain-6"]
    assert len(read) == 8
    assert remaining() == ["rain-1", "rain-2", "rain-3", "rain-6"]
    assert read == []
    (file,) = (tmp_path / "cache/computed").iterdir()
    file.write_text("[1e999]")
    assert remaining() == ["rain-1", "rain-2", "rain-3", "rain-6"]
    assert len(read) == 8
    save(tmp_path / "Rain100H/norain-001.png", picture(0, (48, 64)))
    assert remaining() == ["rain-2", "rain-3", "rain-4", "rain-6"]
    assert len(read) == 8


def test_strict_rain_train_h_needs_the_test_set(tmp_path):
    make_set(tmp_path, "RainTrainH-full", "train", count=2, size=(8, 9))
    with pytest.raises(DerainError, match=r"RainTrainH: .*Rain100H: .*RainTrainH-full"):
        find_pairs("RainTrainH", "train", data_root=tmp_path)
