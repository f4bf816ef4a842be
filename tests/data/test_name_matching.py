from derain.data.layouts import LAYOUTS, Files, Layout
from derain.data.name_matching import describe_contents, find_data_set_folders, list_relative, pair_files
from derain.data.pairs import to_pairs
from tests.factories import clean_image, make_set, save


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(matched, root):
    return [
        (name, rainy.relative_to(root).as_posix(), clean and clean.relative_to(root).as_posix())
        for name, rainy, clean in matched.pairs
    ]


def test_unpaired_and_clashing_files_are_reported(tmp_path):
    touch(tmp_path, "input/a.png", "target/a.png", "input/b.png", "target/c.png", "target/a.jpg", "input/A.bmp")
    matched = pair_files("folder", "train", tmp_path)
    assert pairs(matched, tmp_path) == [("A", "input/A.bmp", "target/a.jpg")]
    assert [path.name for path in matched.unpaired] == ["b.png", "c.png"]
    assert [(a.name, b.name) for a, b in matched.clashes] == [("a.jpg", "a.png"), ("A.bmp", "a.png")]


def test_each_file_has_one_role(tmp_path):
    """A second file of a key is a clash only, and a file without partner is unpaired only."""
    touch(tmp_path, "input/1.png", "input/1.jpg", "input/01.bmp", "input/2.png", "target/1.png", "target/3.png")
    files = pair_files("folder", "train", tmp_path)
    assert pairs(files, tmp_path) == [("1", "input/1.jpg", "target/1.png")]
    assert [path.name for path in files.unpaired] == ["01.bmp", "2.png", "3.png"]
    assert [(first.name, second.name) for first, second in files.clashes] == [("1.jpg", "1.png")]


def test_the_first_matching_variant_is_used(tmp_path):
    touch(tmp_path, "rainy/rain-001.png", "norain-001.png", "input/1.png", "target/1.png")
    matched = pair_files("Rain100L", "test", tmp_path)
    assert pairs(matched, tmp_path) == [("rain-001", "rainy/rain-001.png", "norain-001.png")]
    assert str(matched.variant) == "rainy/rain-{n} with norain-{n}"


def test_x2_suffixes_and_folders_in_names(tmp_path):
    touch(tmp_path, "train/rain/X2/norain-3x2.png", "train/norain/norain-3.png")
    assert pairs(pair_files("Rain200H", "train", tmp_path), tmp_path)[0][0] == "norain-3x2"
    touch(tmp_path / "own", "input/s1/a.png", "target/s1/a.png", "input/s2/a.png", "target/s2/a.png")
    names = [name for name, _, _ in pairs(pair_files("folder", "test", tmp_path / "own"), tmp_path)]
    assert names == ["input/s1/a", "input/s2/a"]


def test_video_frames_share_their_clean_image(tmp_path):
    touch(tmp_path, *(f"real_world/012/012-{frame}/012-{frame}_64_0.png" for frame in (1, 2)))
    touch(tmp_path, "real_world_gt/012/012_64_0.png", "real_world_gt/013/013_64_0.png")
    matched = pair_files("SPA-Data", "train", tmp_path)
    assert [name for name, _, _ in matched.pairs] == ["012-1_64_0", "012-2_64_0"]
    assert [path.name for path in matched.unpaired] == ["013_64_0.png"]


def test_hidden_and_other_files_are_skipped(tmp_path):
    touch(tmp_path, ".thumbs/a.png", "a.png", "notes.txt", "b/.c.png", "b/10.JPG", "b/9.jpg")
    assert list_relative(tmp_path) == ["a.png", "b/9.jpg", "b/10.JPG"]


def test_set_folders_are_listed_nearest_first(tmp_path):
    for folder in ("deep/down/Rain12", "rain12", "x/RAIN12", "Rain120", ".hidden/Rain12"):
        (tmp_path / folder).mkdir(parents=True)
    assert [path.relative_to(tmp_path).as_posix() for path in find_data_set_folders("Rain12", tmp_path)] == [
        "rain12",
        "x/RAIN12",
        "deep/down/Rain12",
    ]
    (tmp_path / "Rain100L/train").mkdir(parents=True)
    assert find_data_set_folders("RainTrainL", tmp_path) == [tmp_path / "Rain100L/train"]


def test_the_description_of_a_folder_lists_images_and_folders(tmp_path):
    assert describe_contents(tmp_path) == "neither folders nor images"
    make_set(tmp_path, "folder", "test", count=1)
    save(tmp_path / "1.png", clean_image(0, (4, 5)))
    assert describe_contents(tmp_path) == "1 image; folders: folder"
    assert describe_contents(tmp_path / "folder") == "folders: input, target"


def test_first_and_last_number_of_a_split_belong_to_it(tmp_path):
    numbers = (1, 900, 901, 1000)
    touch(tmp_path, *(f"rainy_image/{n}_1.jpg" for n in numbers), *(f"ground_truth/{n}.jpg" for n in numbers))
    for split, expected in (("train", ["1_1", "900_1"]), ("test", ["901_1", "1000_1"])):
        assert [name for name, *_ in pair_files("Rain1400", split, tmp_path).pairs] == expected


def test_frames_of_videos_are_named_after_their_sequence(tmp_path):
    for sequence, frame in (("b", "2"), ("b", "10"), ("a", "1")):
        touch(tmp_path, f"input/{sequence}/{frame}.png", f"target/{sequence}/{frame}.png")
    names = [name for name, _, _ in pair_files("video", "test", tmp_path).pairs]
    assert names == ["a/1", "b/2", "b/10"]


def test_sequences_whose_folders_have_the_same_name_are_distinguished(tmp_path, monkeypatch):
    files = Files(r"(?P<scene>\d)/rain/{frame}", r"(?P<scene>\d)/clean/{frame}", video=True)
    monkeypatch.setitem(LAYOUTS, "scenes", Layout("", {"test": (files,)}))
    touch(tmp_path, *(f"{scene}/{side}/{frame}.png" for scene in "12" for side in ("rain", "clean") for frame in "34"))
    matched = pair_files("scenes", "test", tmp_path)
    assert [name for name, _, _ in matched.pairs] == ["1/rain/3", "1/rain/4", "2/rain/3", "2/rain/4"]
    assert [pair.sequence for pair in to_pairs(matched)] == ["1/rain", "1/rain", "2/rain", "2/rain"]
