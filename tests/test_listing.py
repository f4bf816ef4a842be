"""Image files of folders: links, endings, and what is skipped or read in part."""

import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from derain import listing
from derain.cli import main
from derain.commands.output_paths import plan
from derain.data.name_matching import find_data_set_folders
from derain.data.pairs import find_pairs
from derain.data.result_folders import find_scoring_pairs
from derain.data.verify import verify
from derain.images import image_size, read_rgb, write_image
from derain.listing import image_files
from tests.factories import clean_image, make_set, save


@pytest.fixture(autouse=True)
def nothing_warned_yet():
    listing.warn_once.cache_clear()


def names(folder, files):
    return [path.relative_to(folder).as_posix() for path in files]


# Links.


def test_linked_folders_and_files_are_listed(tmp_path):
    save(tmp_path / "store/1.png", clean_image(0))
    photos = tmp_path / "photos"
    (photos / "a/b").mkdir(parents=True)
    (photos / "a/linked").symlink_to(tmp_path / "store")
    (photos / "2.png").symlink_to(tmp_path / "store/1.png")
    assert names(photos, image_files(photos, recursive=True)) == ["2.png", "a/linked/1.png"]


def test_loops_of_links_end(tmp_path):
    for folder in ("x", "y"):
        save(tmp_path / f"{folder}/1.png", clean_image(0))
    (tmp_path / "x/up").symlink_to(tmp_path)
    (tmp_path / "x/self").symlink_to(tmp_path / "x")
    (tmp_path / "x/y").symlink_to(tmp_path / "y")
    (tmp_path / "y/x").symlink_to(tmp_path / "x")
    (tmp_path / "y/broken").symlink_to("broken")
    assert names(tmp_path, image_files(tmp_path, recursive=True)) == ["x/1.png", "y/1.png"]


def test_a_folder_is_listed_once_by_its_own_path_and_links_to_it_are_named(tmp_path, caplog):
    save(tmp_path / "b/x.png", clean_image(0))
    save(tmp_path / "store/deep/y.png", clean_image(1))
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "latest").symlink_to(tmp_path / "b")
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/all").symlink_to(tmp_path / "store")
    (tmp_path / "photos/some").symlink_to(tmp_path / "store/deep")
    assert names(tmp_path, image_files(tmp_path, recursive=True)) == ["b/x.png", "store/deep/y.png"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "5 repeated folder (a, up, latest, …)" in line
    assert "convert" not in line
    assert names(tmp_path, plan(str(tmp_path), tmp_path / "out")) == ["b/x.png", "store/deep/y.png"]
    assert names(tmp_path, image_files(tmp_path / "photos", recursive=True)) == ["photos/all/deep/y.png"]


def test_many_links_list_an_image_once(tmp_path):
    for index in range(31):
        (tmp_path / f"{index}").mkdir()
    for index in range(30):
        for name in ("a", "b"):
            (tmp_path / f"{index}/{name}").symlink_to(tmp_path / f"{index + 1}")
    save(tmp_path / "30/x.png", clean_image(0))
    assert names(tmp_path, image_files(tmp_path / "0", recursive=True)) == [f"0/{'a/' * 30}x.png"]


def test_sets_behind_links_are_found(tmp_path):
    store = make_set(tmp_path / "store", "Rain100L", "test").rename(tmp_path / "store/files of rain")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/Rain100L").symlink_to(store)
    assert len(find_pairs("Rain100L", "test", data_root=tmp_path / "data").pairs) == 4
    assert find_pairs(tmp_path / "data/Rain100L", "test").layout == "Rain100L"
    sets, _ = verify(tmp_path / "data")
    assert [(str(split), len(split.files.pairs)) for split in sets] == [("Rain100L test", 4)]


def test_a_set_is_found_by_the_name_of_a_link_to_it(tmp_path):
    store = make_set(tmp_path / "data", "Rain100L", "test").rename(tmp_path / "data/files of rain")
    (tmp_path / "data/Rain100L").symlink_to(store)
    sets, findings = verify(tmp_path / "data")
    assert [(str(split), len(split.files.pairs)) for split in sets] == [("Rain100L test", 4)]
    assert [finding.files for finding in findings if finding.kind == "skipped"] == [(str(tmp_path / "data/Rain100L"),)]


def test_two_links_to_one_set_are_counted_once(tmp_path):
    folder = make_set(tmp_path / "data/a", "Rain100L", "test")
    (tmp_path / "data/b").mkdir()
    (tmp_path / "data/b/Rain100L").symlink_to(folder)
    assert find_data_set_folders("Rain100L", tmp_path / "data") == [folder]
    assert len(find_pairs("Rain100L", "test", data_root=tmp_path / "data").pairs) == 4
    assert [len(split.files.pairs) for split in verify(tmp_path / "data")[0]] == [4]


def test_sets_that_share_linked_clean_images_keep_their_pairs(tmp_path):
    folder = make_set(tmp_path, "folder", "test")
    shutil.copytree(folder / "input", tmp_path / "other/input")
    (tmp_path / "other/target").symlink_to(folder / "target")
    assert len(find_pairs(tmp_path / "other", "test").pairs) == 4


# Endings.


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPE", ".jpg", ".avif"])
def test_such_endings_are_images(tmp_path, ending):
    pixels = clean_image(0)
    Image.fromarray(pixels).save(tmp_path / f"a{ending}", "AVIF" if ending == ".avif" else "JPEG", quality=95)
    (file,) = image_files(tmp_path)
    assert np.abs(read_rgb(file).astype(int) - pixels).mean() < 8
    write_image(tmp_path / f"b{ending}", pixels)
    assert np.abs(read_rgb(tmp_path / f"b{ending}").astype(int) - pixels).mean() < 8


def mixed(folder):
    """One image that is read, and others that are not."""
    save(folder / "1.png", clean_image(0))
    for name in ("2.gif", "10.gif", "a.GIF", "b.gif", "deep/c.heic", "notes.txt", ".d.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "e.png").symlink_to("nowhere")
    return folder


EXPECTED = ("4 .gif (2.gif, 10.gif, a.GIF, …)", "1 .heic (c.heic)", "1 broken link (e.png)")


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: plan(str(folder), folder.parent / "out"),
        lambda folder: find_pairs(folder, "predict"),
        lambda folder: main(["data", "synthesize", str(folder), str(folder.parent / "set")]),
    ],
    ids=["restore", "predict", "synthesize"],
)
def test_skipped_images_are_counted_and_named_in_one_line(tmp_path, caplog, use):
    use(mixed(tmp_path / "photos"))
    (line,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert line.startswith(f"{tmp_path / 'photos'}: ")
    assert all(part in line for part in EXPECTED)


def test_images_that_a_glob_skips_are_counted_and_named(tmp_path, caplog):
    plan(f"{mixed(tmp_path / 'photos')}/**/*", tmp_path / "out")
    assert all(part in caplog.text for part in EXPECTED)


def test_images_that_score_skips_are_counted_and_named(tmp_path, caplog):
    save(tmp_path / "clean/1.png", clean_image(0))
    assert len(find_scoring_pairs(mixed(tmp_path / "derained"), str(tmp_path / "clean"))) == 1
    assert EXPECTED[0] in caplog.text


def test_verify_reports_skipped_images_once(tmp_path, capsys, caplog):
    folder = make_set(tmp_path, "folder", "test")
    for name in ("input/9.gif", "target/9.gif", "input/8.heic"):
        (folder / name).touch()
    assert main(["data", "verify", str(folder), "--format", "json"]) == 0
    findings = [one for one in json.loads(capsys.readouterr().out) if one["kind"] == "skipped"]
    assert [one["files"] for one in findings] == [
        [str(folder / "input/8.heic")],
        [str(folder / "input/9.gif"), str(folder / "target/9.gif")],
    ]
    assert "skipped" not in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, caplog):
    save(tmp_path / "1.png", clean_image(0))
    (tmp_path / "secret").mkdir()
    scan = listing.os.scandir

    def refusing(folder):
        if folder.name == "secret":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(listing.os, "scandir", refusing)
    assert names(tmp_path, image_files(tmp_path, recursive=True)) == ["1.png"]
    assert "1 unreadable folder (secret)" in caplog.text
    with pytest.raises(PermissionError, match="secret"):
        image_files(tmp_path / "secret")


# Frames and pages.


def write_frames(path, count=3):
    frames = [Image.fromarray(clean_image(index)) for index in range(count)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


@pytest.mark.parametrize("ending", [".tif", ".png", ".webp"])
def test_the_first_frame_is_used_and_the_others_are_noted_once(tmp_path, ending, caplog):
    several, single = write_frames(tmp_path / f"a{ending}"), write_frames(tmp_path / f"b{ending}", count=1)
    for _ in range(2):
        assert np.array_equal(read_rgb(several), clean_image(0))
        read_rgb(single)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{several}: ")


def test_pages_of_a_deep_tiff_are_noted(tmp_path, caplog):
    cv2.imwritemulti(str(tmp_path / "a.tif"), [np.full((8, 9), value, np.uint16) for value in (300, 500)])
    assert image_size(tmp_path / "a.tif") == (8, 9)
    read_rgb(tmp_path / "a.tif")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path / 'a.tif'}: ")


def test_many_files_of_several_frames_give_few_lines_and_a_total(tmp_path, caplog):
    (tmp_path / "derained").mkdir()
    for index in range(9):
        write_frames(tmp_path / f"derained/{index}.tif")
        save(tmp_path / f"clean/{index}.png", clean_image(0))
    command = ["score", str(tmp_path / "derained"), str(tmp_path / "clean"), "--protocol", "rgb"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    lines = [record.getMessage() for record in caplog.records if "frames" in record.getMessage()]
    assert len(lines) == 6
    assert lines[-1].startswith("9 files")


def test_verify_finds_files_of_several_frames(tmp_path):
    folder = make_set(tmp_path, "folder", "test")
    file = folder / "target/9.tif"
    save(folder / "input/9.png", clean_image(0))
    write_frames(file)
    found = [finding for finding in verify(folder)[1] if finding.kind == "frames"]
    assert [(one.files, one.level) for one in found] == [((str(file),), "warning")]
