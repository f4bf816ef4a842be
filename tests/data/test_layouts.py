import re

import pytest

from derain.data.layouts import LAYOUTS
from derain.data.pairs import find_pairs
from derain.data.verify import verify
from tests.factories import clean_image, make_set, save
from tests.trees import TREES, file_names

NAMED = [name for name, layout in LAYOUTS.items() if layout.folders]
SPLITS = [(name, split) for name in NAMED for split in LAYOUTS[name].files]
CASES = [(name, split, variant) for name, split in SPLITS for variant in range(len(file_names(name, split, 1)))]
PAIRED = [case for case in CASES if case[0] != "RainTrainH" and case[1] != "predict"]  # RainTrainH needs Rain100H


def test_there_is_a_tree_for_every_layout():
    assert set(TREES) == set(LAYOUTS)


@pytest.mark.parametrize(("name", "split", "variant"), PAIRED)
def test_each_set_is_found_by_name_and_its_pairs_belong_together(tmp_path, name, split, variant):
    make_set(tmp_path, name, split, count=3, size=(16, 24), seed=7, variant=variant)
    count = len(file_names(name, split, 3)[variant])
    found = find_pairs(name, split, data_root=tmp_path)
    assert (found.name, found.layout, len(found.pairs)) == (name, name, count)
    assert len({pair.name for pair in found.pairs}) == count
    for pair in found.pairs:
        rainy, clean = pair.read()
        residual = rainy.astype(int) - clean
        assert residual.min() >= (-60 if pair.rainy.suffix == ".jpg" else 0)  # rain only brightens
        assert residual.mean() > 2
        assert bool(pair.sequence) == LAYOUTS[name].files[split][0].video
        assert pair.sequence in {"", pair.rainy.parent.name}


@pytest.mark.parametrize(
    ("name", "split", "variant"),
    [case for case in CASES if case[0] not in {"RainTrainH", "RainTrainH-full", "Raindrop-B"}],
)
def test_each_set_is_detected_by_its_folder(tmp_path, name, split, variant):
    folder = make_set(tmp_path, name, split, count=3, size=(16, 24), variant=variant)
    found = find_pairs(folder, split)
    if name not in {"Outdoor-Rain-Test1", "AllWeather-rain"}:  # splits of a set whose folder they share
        assert found.layout == name
        assert found.pairs == find_pairs(name, split, data_root=tmp_path).pairs
    assert any("detected by the name" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "split", "variant"),
    [case for case in PAIRED if case[:2] != ("Rain1200", "test")],  # as Rain800's
)
def test_each_set_is_detected_by_its_files(tmp_path, name, split, variant):
    folder = make_set(tmp_path, name, split, count=3, size=(16, 24), variant=variant)
    files = {(pair.rainy, pair.clean) for pair in find_pairs(name, split, data_root=tmp_path).pairs}
    moved = folder.rename(tmp_path / "mine")
    found = {
        tuple(folder / path.relative_to(moved) for path in (pair.rainy, pair.clean))
        for pair in find_pairs(moved, split).pairs
    }
    assert found == files


def broken(file, kind):
    """Plant a fault in a rainy file, or remove the clean one."""
    if kind == "unreadable":
        file.write_bytes(file.read_bytes()[:80])
    elif kind == "size":
        save(file, clean_image(5, (32, 40)))
    else:
        file.unlink()


@pytest.mark.parametrize(("name", "split", "variant"), [case for case in PAIRED if case[2] == 0])
def test_faults_in_each_set_are_found(tmp_path, name, split, variant):
    folder = make_set(tmp_path, name, split, count=3, variant=variant)
    pairs = find_pairs(name, split, data_root=tmp_path).pairs
    layouts = ["Outdoor-Rain", "AllWeather", "RainTrainH-full", name]
    assert {finding.kind for finding in verify(folder)[1]} <= {"count", "backgrounds"}
    faults = {"unreadable": pairs[0].rainy}
    if pairs[0].clean_side is None:
        faults |= {"size": pairs[1].rainy, "unpaired": pairs[-1].clean}
    for kind, file in faults.items():
        broken(file, kind)
    findings = verify(folder)[1]
    assert {finding.set.split(" ")[0] for finding in findings} <= set(layouts)
    for kind, file in faults.items():
        files = {path for finding in findings if finding.kind == kind for path in finding.files}
        expected = {str(pair.rainy) for pair in pairs if pair.clean == file} if kind == "unpaired" else {str(file)}
        assert files >= expected, kind


@pytest.mark.parametrize("side", ["rainy", "clean"])
@pytest.mark.parametrize(("name", "split", "variant"), [case for case in PAIRED if case[2] == 0])
def test_a_split_without_one_side_is_found(tmp_path, name, split, variant, side):
    folder = make_set(tmp_path, name, split, count=3, size=(16, 24), variant=variant)
    pairs = find_pairs(name, split, data_root=tmp_path).pairs
    if pairs[0].clean_side is not None:
        return
    make_set(tmp_path, "Rain800", "test", count=2)  # complete, so that something is left to be verified
    for file in {getattr(pair, side) for pair in pairs}:
        file.unlink()
    errors = [finding for finding in verify(tmp_path)[1] if finding.kind == "unpaired"]
    left = {str(pair.rainy if side == "clean" else pair.clean) for pair in pairs}
    assert {file for finding in errors for file in finding.files} == left
    assert all(str(folder) in file for finding in errors for file in finding.files)


def test_missing_frames_are_found(tmp_path):
    folder = make_set(tmp_path, "NTURain", "train", count=5)
    missing = folder / "Dataset_Training_Synthetic/t1_Rain_01/00003.jpg"
    missing.unlink()  # its clean frame has another rainy one
    gaps = [finding for finding in verify(folder)[1] if finding.kind == "gap"]
    assert [finding.files for finding in gaps] == [(str(missing.with_name("00004.jpg")),)]


def test_sets_say_where_they_come_from_and_how_they_are_scored():
    for name in NAMED:
        layout = LAYOUTS[name]
        assert layout.source.startswith("https://"), name
        assert re.search(r"\d{4}", layout.citation), name
        assert set(layout.counts) <= set(layout.files), name
        assert layout.partner in {"", *LAYOUTS}, name
        assert layout.protocols or layout.remarks or "test" not in layout.files, name


def test_strict_and_full_rain_train_h_differ_by_the_published_number():
    assert LAYOUTS["RainTrainH-full"].counts["train"] - LAYOUTS["RainTrainH"].counts["train"] == 546


def test_rain_800_and_rain_1200_lie_the_other_way_round(tmp_path):
    for name, at in [("Rain800", "left"), ("Rain1200", "right")]:
        make_set(tmp_path, name, "test", count=1, size=(32, 40), seed=3)
        (pair,) = find_pairs(name, "test", data_root=tmp_path).pairs
        assert pair.clean_side == at
        _, clean = pair.read()
        assert abs(clean.astype(int) - clean_image(3, (32, 40))).mean() < 6


def test_rain_1400_is_split_by_number_where_all_lie_in_one_folder(tmp_path):
    make_set(tmp_path, "Rain1400", "train", count=2, size=(16, 24), variant=1)
    make_set(tmp_path, "Rain1400", "test", count=1, size=(16, 24), variant=1)
    train = find_pairs("Rain1400", "train", data_root=tmp_path)
    test = find_pairs("Rain1400", "test", data_root=tmp_path)
    assert [pair.name for pair in train.pairs] == ["1_1", "1_2", "1_3", "2_1", "2_2", "2_3"]
    assert {pair.clean for pair in test.pairs} == {tmp_path / "Rain1400/ground_truth/901.jpg"}


def test_real_sets(real_data):
    for name, split, count in [
        ("Rain100L", "test", 100),
        ("Rain100H", "test", 100),
        ("Rain800", "train", 700),
        ("Rain800", "test", 100),
        ("Rain800", "predict", 52),
    ]:
        found = find_pairs(name, split, data_root=real_data)
        assert (len(found.pairs), found.notes) == (count, ())
    assert find_pairs("Rain100L", "test", data_root=real_data).pairs[0].rainy.name == "rain-001.png"
