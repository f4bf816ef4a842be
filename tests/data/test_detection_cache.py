"""The pairs of a large folder are cached until a file is added, removed or renamed, or changed if they are detected."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from derain.data import pairs
from derain.data.detection_cache import detection_key, load_detection, save_detection
from derain.data.name_matching import list_unsorted, pair_files
from derain.data.pairs import find_pairs
from derain.errors import DerainError
from derain.images import write_image
from tests.factories import make_set


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "CACHED_FROM", 1)
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for side in ("input", "target"):
        for number in range(3):
            write_image(root / side / f"{number}.png", np.full((4, 5, 3), number, np.uint8))
    write_image(root / "input" / "alone.png", np.zeros((4, 5, 3), np.uint8))
    return root


def is_cached(pair_set):
    return any("from the cache" in note for note in pair_set.notes)


def without_reason(pair_set):
    return pair_set.pairs, pair_set.layout, pair_set.notes[1:]


def test_a_second_start_finds_the_same(folder):
    first, second = find_pairs(folder, "train"), find_pairs(folder, "train")
    assert (is_cached(first), is_cached(second)) == (False, True)
    assert without_reason(first) == without_reason(second)
    assert len(second.pairs) == 3
    assert any("alone.png" in note for note in second.notes)
    assert not is_cached(find_pairs(folder, "predict"))


def add(folder):
    for side in ("input", "target"):
        shutil.copy(folder / side / "0.png", folder / side / "7.png")


def remove(folder):
    (folder / "target" / "1.png").unlink()


def rename(folder):
    (folder / "input" / "1.png").rename(folder / "input" / "x.png")


def change(folder):
    write_image(folder / "input" / "1.png", np.full((9, 9, 3), 77, np.uint8))


def touch(folder):
    file = folder / "input" / "1.png"
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize(("alter", "count"), [(add, 4), (remove, 2), (rename, 2), (change, 3), (touch, 3)])
def test_a_change_is_noticed(folder, alter, count):
    find_pairs(folder, "train")
    alter(folder)
    found = find_pairs(folder, "train")
    assert not is_cached(found)
    assert len(found.pairs) == count
    assert is_cached(find_pairs(folder, "train"))


@pytest.mark.parametrize(("alter", "count"), [(add, 4), (remove, 2), (rename, 2)])
def test_pairs_of_a_named_set_are_cached_by_the_names_of_its_files(folder, monkeypatch, alter, count):
    calls = []
    monkeypatch.setattr(pairs, "pair_files", lambda *values: calls.append(values) or pair_files(*values))
    first = find_pairs(f"Rain13K:{folder}", "train")
    change(folder)  # the pairs depend on names alone
    second = find_pairs(f"Rain13K:{folder}", "train")
    assert len(calls) == 1
    assert (second.pairs, second.notes) == (first.pairs, first.notes)
    alter(folder)
    assert len(find_pairs(f"Rain13K:{folder}", "train").pairs) == count
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["", "Rain13K:"])
def test_the_order_of_the_file_system_does_not_matter(folder, monkeypatch, name):
    first = find_pairs(f"{name}{folder}", "train")
    monkeypatch.setattr(pairs, "list_unsorted", lambda root: list_unsorted(root)[::-1])
    second = find_pairs(f"{name}{folder}", "train")
    assert second.pairs == first.pairs
    assert len(list((folder.parent / "cache" / "computed").iterdir())) == 1


def test_pairs_of_the_root_folder_are_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    root, files = Path("/"), ["input/1.png", "target/1.png"]
    detection = ("folder", "", pair_files("folder", "train", root, files))
    assert len(detection[2].pairs) == 1
    key = detection_key(root, "train", "folder", files)
    save_detection(key, root, files, detection)
    assert load_detection(key, root, files) == detection


def test_a_moved_folder_is_detected_again(folder):
    find_pairs(folder, "train")
    moved = folder.rename(folder.parent / "Rain100L")
    assert not is_cached(find_pairs(moved, "test"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layout": "folder", "reason": "", "pairs": [["a", 99, 0]]}'])
def test_a_damaged_cache_is_ignored(folder, content):
    first = find_pairs(folder, "train")
    (file,) = (folder.parent / "cache" / "computed").iterdir()
    file.write_text(content)
    second = find_pairs(folder, "train")
    assert not is_cached(second)
    assert without_reason(second) == without_reason(first)
    assert json.loads(file.read_text())["layout"] == "folder"


def test_clashes_are_errors_each_time(folder):
    shutil.copy(folder / "target" / "1.png", folder / "target" / "1.bmp")
    for _ in range(2):
        with pytest.raises(DerainError, match=r"1\.(bmp|png)"):
            find_pairs(folder, "train")


def test_a_folder_without_pairs_of_a_layout_is_an_error_each_time(folder):
    shutil.rmtree(folder / "target")
    for _ in range(2):
        with pytest.raises(DerainError, match=f"Rain1400.*{re.escape(str(folder))}"):
            find_pairs(f"Rain1400:{folder}", "train")


def test_small_folders_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("DERAIN_CACHE", str(tmp_path / "cache"))
    root = make_set(tmp_path / "data", "Rain800", "train", count=2)
    find_pairs(root, "train")
    assert not (tmp_path / "cache" / "computed").exists()
