import re

import pytest

from derain.data.result_folders import find_scoring_pairs, match_names
from derain.errors import DerainError
from tests.factories import clean_image, save


@pytest.fixture
def folders(tmp_path):
    """Three results named like rainy images, and their clean images."""
    for index in range(3):
        save(tmp_path / "derained" / f"rain-{index:03d}.png", clean_image(index))
        save(tmp_path / "clean" / f"norain-{index}.png", clean_image(index))
    return tmp_path / "derained", tmp_path / "clean"


def files(pairs):
    return [(pair.name, pair.derained.name, pair.clean and pair.clean.name) for pair in pairs]


def test_files_are_found_by_name(folders):
    derained, clean = folders
    assert files(find_scoring_pairs(derained, str(clean))) == [
        (f"rain-{index:03d}", f"rain-{index:03d}.png", f"norain-{index}.png") for index in range(3)
    ]
    file = derained / "rain-001.png"
    assert files(find_scoring_pairs(file, str(clean))) == [("rain-001", "rain-001.png", "norain-1.png")]
    assert files(find_scoring_pairs(file, str(clean / "norain-2.png"))) == [
        ("rain-001", "rain-001.png", "norain-2.png")
    ]
    assert files(find_scoring_pairs(file, None)) == [("rain-001", "rain-001.png", None)]


def test_a_plain_folder_in_a_side_by_side_set_is_not_side_by_side(tmp_path):
    for index in range(2):
        save(tmp_path / "Rain800" / "test_syn" / f"{index + 1}.jpg", clean_image(index))
        save(tmp_path / "derained" / f"{index + 1}.png", clean_image(index))
    found = find_scoring_pairs(tmp_path / "derained", str(tmp_path / "Rain800"))
    assert files(found) == [("1", "1.png", "1.jpg"), ("2", "2.png", "2.jpg")]


def test_comparisons_are_not_results(folders):
    derained, clean = folders
    save(derained / "rain-001.png-compare.png", clean_image(9, (48, 200)))
    assert len(find_scoring_pairs(derained, str(clean))) == 3


def test_two_files_of_one_name_are_rejected(folders):
    derained, clean = folders
    save(derained / "rain-001.jpg", clean_image(1))
    with pytest.raises(DerainError, match=r"rain-001\.(png|jpg): .*rain-001\.(png|jpg)"):
        find_scoring_pairs(derained, str(clean))


def test_other_sizes_are_rejected(folders):
    derained, clean = folders
    save(derained / "rain-001.png", clean_image(1, (24, 32)))
    pair = find_scoring_pairs(derained, str(clean))[1]
    with pytest.raises(DerainError, match=r"rain-001\.png: .*32x24.*norain-1\.png.*64x48"):
        pair.read()


@pytest.mark.parametrize(
    ("derained", "clean"),
    [
        (["a", "b"], ["a", "b"]),
        (["rain-001", "rain-010"], ["norain-001", "norain-010"]),
        (["rain-1", "rain-10"], ["norain-001", "norain-010"]),
        (["norain-1x2", "norain-2x2"], ["norain-1", "norain-2"]),
        (["1_derained", "10_derained"], ["1", "10"]),
        (["im_0001_s80_a04_out", "im_0002_s80_a04_out"], ["im_0001_s80_a04", "im_0002_s80_a04"]),
        (["PReNet6_rain-1", "PReNet6_rain-2"], ["1", "2"]),
        (["rain-7_restormer_v2", "rain-8_restormer_v2"], ["norain-7", "norain-8"]),
        (["output/rain-1", "output/rain-2"], ["gt/1", "gt/2"]),
        (["город-1", "город-2"], ["город-01", "город-02"]),
        (["cafe\u0301_out", "nin\u0303o_out"], ["caf\u00e9", "ni\u00f1o"]),
        (["caf\u00e9"], ["cafe\u0301"]),
        (["a\udce9_out", "a\udce8_out"], ["a\udce9", "a\udce8"]),
    ],
)
def test_names_match(derained, clean):
    shuffled = clean[::-1]
    assert match_names(derained, shuffled) == dict(zip(derained, clean, strict=True))


def test_one_clean_image_has_several_numbered_results():
    derained = [f"{i}_{j}" for i in (1, 2, 10) for j in (1, 2, 10)]
    found = match_names(derained, ["10", "1", "2"])
    assert all(found[name] == name.partition("_")[0] for name in derained)


@pytest.mark.parametrize(
    ("derained", "clean", "pattern"),
    [
        (["1", "2"], ["1", "3"], r"D: .*\b2; C: .*\b3;"),
        (["1"], ["1", "2"], r"^C: .*\b2;"),
        (["1", "2"], ["1"], r"^D: .*\b2;"),
        (["city_1", "city_2"], ["forest_1", "forest_2"], "D: .*city_1, city_2"),
        (["rain-1", "1"], ["norain-1", "norain-2"], "D: rain-1, 1 "),
        (["rain-1"], ["1", "01"], "D: rain-1 .*C: 1, 01"),
        ([str(i) for i in range(20, 30)], ["1"], "20, 21, 22, 23, 24 and 5 more"),
    ],
)
def test_names_without_partner_are_rejected(derained, clean, pattern):
    with pytest.raises(DerainError, match=pattern) as caught:
        match_names(derained, clean, labels=("D", "C"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("derained", "clean", "fitting"),
    [
        ("scene_3_rain_12", ["3", "12", "5"], "3, 12"),
        ("PReNet6_rain-1", ["1", "6"], "6, 1"),
        ("12_3", ["3", "12"], "12, 3"),
        ("scene_3_rain_12", ["3", "03"], "3, 03"),
        ("a_b", ["b", "a"], "a, b"),
        ("rain-1", ["1", "norain-1"], "1, norain-1"),
        ("caf\u00e9", ["cafe\u0301", "caf\u00e9"], "cafe\u0301, caf\u00e9"),
    ],
)
def test_a_result_that_matches_several_clean_images_is_rejected(derained, clean, fitting):
    with pytest.raises(DerainError) as caught:
        match_names([derained], clean, allow_extra=True, labels=("D", "C"))
    assert re.search(f"{derained} .* C: {fitting};", str(caught.value))


@pytest.mark.parametrize(
    ("derained", "clean", "found"),
    [
        ("scene_3", ["3", "scene_3"], "scene_3"),
        ("scene_3_rain_12", ["3", "scene_3_12"], "scene_3_12"),
        ("scene_3_rain_12", ["3", "5"], "3"),
        ("1", ["1", "01"], "1"),
    ],
)
def test_the_whole_name_has_priority_over_a_part(derained, clean, found):
    assert match_names([derained], clean, allow_extra=True) == {derained: found}


@pytest.mark.parametrize(
    ("derained", "clean"),
    [
        (["1_2", "2_1"], ["1", "2"]),  # neither number is shared: no prefix, no suffix
        (["caf\udce9"], ["caf\udce8"]),
        (["\u0915\u093f"], ["\u0915\u093e"]),  # one consonant, two vowel signs
        (["cafe\u0301"], ["cafe"]),
        (["\N{UMBRELLA}"], ["\N{SNOWMAN}"]),
    ],
)
def test_names_that_differ_in_a_sign_or_byte_do_not_match(derained, clean):
    with pytest.raises(DerainError, match=re.escape(derained[0])):
        match_names(derained, clean, allow_extra=True)


def test_unscored_images_in_subfolders_are_reported(folders, caplog):
    derained, clean = folders
    save(derained / "more/rain-009.png", clean_image(9))
    assert len(find_scoring_pairs(derained, str(clean))) == 3
    assert f"{derained}: 1 " in caplog.text


def test_explanations_are_not_results(folders):
    derained, clean = folders
    save(derained / "rain-001-explain.png", clean_image(9))
    save(derained / "rain-002.png-explain.png", clean_image(9))
    assert len(find_scoring_pairs(derained, str(clean))) == 3


def test_the_matching_split_is_used_and_two_are_rejected(tmp_path, capsys):
    for split, numbers in (("test", (1, 2)), ("train", (1, 2, 3))):
        for number in numbers:
            for side in ("input", "target"):
                save(tmp_path / f"s/{split}/{side}/{number}.png", clean_image(number))
    for number in (1, 2, 3):
        save(tmp_path / f"derained/{number}.png", clean_image(number))
    pairs = find_scoring_pairs(tmp_path / "derained", str(tmp_path / "s"))
    assert {pair.clean.clean.parent.parent.name for pair in pairs} == {"train"}
    assert "s, train" in capsys.readouterr().err
    with pytest.raises(DerainError, match=r"1\.png: .* s, test and s, train"):
        find_scoring_pairs(tmp_path / "derained/1.png", str(tmp_path / "s"))
    assert (
        find_scoring_pairs(tmp_path / "derained/3.png", str(tmp_path / "s"))[0].clean.clean.parent.parent.name
        == "train"
    )


@pytest.mark.parametrize(
    ("test", "train", "result", "found"),
    [
        (("3_12", "4_1"), ("3", "12", "7"), "3_12", "test/clean/3_12.png"),
        (("3", "12"), ("3_12", "4_1"), "3_12", "train/clean/3_12.png"),
        (("3", "12"), ("rain-3_12", "4_1"), "3_12_out", "train/clean/rain-3_12.png"),
        (("3", "5"), ("3_12", "4_1"), "3_12", "train/clean/3_12.png"),  # each matches one image, by different rules
        (("3", "12"), ("3", "5"), "scene_3_12", None),
        (("3_12", "03_12"), ("3", "12"), "rain-3_12", None),
    ],
)
def test_the_strictest_rule_over_all_splits_is_used(tmp_path, test, train, result, found):
    for split, names in (("test", test), ("train", train)):
        for name in names:
            for side in ("rainy", "clean"):
                save(tmp_path / f"s/{split}/{side}/{name}.png", clean_image(len(name)))
    derained = tmp_path / f"res/{result}.png"
    save(derained, clean_image(0))
    if found is None:
        with pytest.raises(DerainError, match=re.escape(str(derained))):
            find_scoring_pairs(derained, str(tmp_path / "s"))
    else:
        (pair,) = find_scoring_pairs(derained, str(tmp_path / "s"))
        assert pair.clean.clean == tmp_path / "s" / found
