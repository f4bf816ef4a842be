import re

import pytest

from derain.data.layouts import LAYOUTS
from derain.data.pairs import find_pairs
from tests.factories import clean_image, make_set

CASES = [
    ("Rain100L", "test", 0, 4),
    ("Rain100L", "test", 1, 4),
    ("Rain100L", "test", 2, 4),
    ("Rain100H", "test", 0, 4),
    ("Rain100H", "test", 1, 4),
    ("RainTrainL", "train", 0, 4),
    ("RainTrainH-full", "train", 0, 4),
    ("Rain800", "train", 0, 4),
    ("Rain800", "test", 0, 4),
    *[
        (name, split, variant, 4)
        for name in ("Rain200L", "Rain200H")
        for split in ("train", "test")
        for variant in range(3)
    ],
    ("Rain1200", "train", 0, 4),
    ("Rain1200", "test", 0, 4),
    *[("Rain1400", split, variant, 12) for split in ("train", "test") for variant in range(2)],
    ("Rain12", "test", 0, 4),
    ("Rain13K", "train", 0, 4),
    ("Rain13K", "test", 0, 12),
    *[(name, "test", 0, 4) for name in ("Test100", "Test1200", "Test2800")],
    ("SPA-Data", "train", 0, 8),
    ("SPA-Data", "test", 0, 4),
]


@pytest.mark.parametrize(("name", "split", "variant", "count"), CASES)
def test_each_set_is_found_by_name_and_its_pairs_belong_together(tmp_path, name, split, variant, count):
    make_set(tmp_path, name, split, count=4, size=(16, 24), seed=7, variant=variant)
    found = find_pairs(name, split, data_root=tmp_path)
    assert (found.name, found.layout, len(found.pairs)) == (name, name, count)
    assert len({pair.name for pair in found.pairs}) == count
    for pair in found.pairs:
        rainy, clean = pair.read()
        residual = rainy.astype(int) - clean
        assert residual.min() >= (-60 if pair.rainy.suffix == ".jpg" else 0)  # rain only brightens
        assert residual.mean() > 2


@pytest.mark.parametrize(
    ("name", "split", "variant", "count"), [case for case in CASES if case[0] != "RainTrainH-full"]
)
def test_each_set_is_detected_by_its_folder(tmp_path, name, split, variant, count):
    folder = make_set(tmp_path, name, split, count=4, size=(16, 24), variant=variant)
    found = find_pairs(folder, split)
    by_name = find_pairs(name, split, data_root=tmp_path)
    assert found.pairs == by_name.pairs
    assert any("detected by the name" in note for note in found.notes)


def test_every_layout_is_covered():
    covered = {name for name, *_ in CASES} | {"folder", "images", "RainTrainH"}
    assert set(LAYOUTS) == covered


def test_sets_say_where_they_come_from_and_how_many_they_are():
    for name, layout in LAYOUTS.items():
        if not layout.folders:
            continue
        assert layout.source.startswith("https://"), name
        assert re.search(r"\d{4}", layout.citation), name
        assert set(layout.counts) == set(layout.files), name
        assert layout.partner in {"", *LAYOUTS}, name


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
