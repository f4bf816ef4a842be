import shutil

import pytest

from derain.data.discovery import find_lone_sides, find_sets
from derain.data.layouts import LAYOUTS
from derain.errors import DerainError
from tests.factories import clean_image, make_set, save


def found(root, layout=None):
    return [(str(split), split.layout, len(split.files.pairs)) for split in find_sets(root, layout)]


def test_all_sets_below_a_data_root_are_found_in_the_order_of_the_layouts(tmp_path):
    make_set(tmp_path, "Rain12", "test", count=2)
    for split, count in (("train", 3), ("test", 2), ("predict", 1)):
        make_set(tmp_path, "Rain800", split, count=count)
    make_set(tmp_path, "Rain100H", "test", count=2, variant=1)
    assert found(tmp_path) == [
        ("Rain100H test", "Rain100H", 2),
        ("Rain800 train", "Rain800", 3),
        ("Rain800 test", "Rain800", 2),
        ("Rain800 predict", "Rain800", 1),
        ("Rain12 test", "Rain12", 2),
    ]
    assert found(tmp_path / "Rain800") == found(tmp_path)[1:4]


def test_sets_inside_a_set_are_counted_once(tmp_path):
    make_set(tmp_path, "Rain13K", "train", count=2)
    make_set(tmp_path, "Rain13K", "test", count=2)
    make_set(tmp_path, "Rain12", "test", count=2, seed=500)
    assert found(tmp_path) == [
        ("Rain12 test", "Rain12", 2),
        ("Rain13K train", "Rain13K", 2),
        ("Rain13K test", "Rain13K", 6),
    ]


def test_the_name_of_a_split_folder_gives_the_split(tmp_path):
    folder = make_set(tmp_path, "Rain800", "train", count=3)
    assert found(folder / "training") == [("training train", "Rain800", 3)]
    folder = make_set(tmp_path, "folder", "test", count=2)
    assert found(folder.rename(tmp_path / "test")) == [("test test", "folder", 2)]


def test_strict_and_full_sets_of_the_same_files_are_counted_once(tmp_path):
    make_set(tmp_path, "RainTrainH-full", "train", count=3)
    assert found(tmp_path) == [("RainTrainH-full train", "RainTrainH-full", 3)]
    assert found(tmp_path / "RainTrainH") == found(tmp_path)


def test_a_given_layout_is_used(tmp_path):
    folder = make_set(tmp_path, "Rain1200", "test", count=2)
    moved = folder.rename(tmp_path / "mine")
    assert found(moved, "Rain1200") == [("mine test", "Rain1200", 2)]


def test_missing_sets_and_unknown_layouts_are_rejected(tmp_path):
    with pytest.raises(DerainError, match=r"predict.*neither folders nor images"):
        find_sets(tmp_path)
    with pytest.raises(DerainError, match=r"--layout Rain7: .*Rain100L"):
        find_sets(tmp_path, layout="Rain7")
    with pytest.raises(DerainError, match=r"Rain12 .*neither folders nor images.*rainy/"):
        find_sets(tmp_path, layout="Rain12")
    assert "Rain12" in LAYOUTS


def test_rainy_images_are_no_lone_side_if_their_layout_has_such_a_split(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"NTURain/ra1_Rain/{number}.jpg", clean_image(number))
    assert found(tmp_path) == [("NTURain predict", "NTURain", 2)]
    assert list(find_lone_sides(tmp_path, find_sets(tmp_path))) == []


def test_rainy_images_of_a_set_of_pairs_are_a_lone_side(tmp_path):
    folder = make_set(tmp_path, "Rain12", "test", count=3)
    (folder / "rainy").rename(folder / "input")
    shutil.rmtree(folder / "groundtruth")
    ((name, files),) = find_lone_sides(tmp_path, find_sets(tmp_path))
    assert (name, [file.name for file in files]) == ("Rain12 test", ["1.png", "2.png", "3.png"])
