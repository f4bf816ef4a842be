"""Data sets from archives on the disk."""

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.commands.fetch.serving import contents, error, fetch, make_zip
from tests.factories import make_set


def test_other_archives_are_refused_before_and_kept_after_the_download(server, root, tmp_path, capsys):
    server.files["/a.rar"] = server.files["/a"] = b"Rar!\x1a\x07\x01\x00" + bytes(5000)
    assert fetch(root, "--from", f"{server.url}/a.rar") == 2
    assert "a.rar" in error(capsys)
    assert server.count() == 0
    assert fetch(root, "--from", f"{server.url}/a") == 2
    assert "RAR" in error(capsys)
    assert (root / ".Rain12.part/download/a").stat().st_size == 5008
    (tmp_path / "b.zip").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(50))
    assert fetch(root, "--archive", str(tmp_path / "b.zip")) == 2
    assert "7z" in error(capsys)


def test_metadata_of_systems_is_not_unpacked(root, tmp_path):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    first = make_zip(tmp_path / "a.zip", files | {"rainy/._1.png": b"x", ".DS_Store": b"1", "Thumbs.db": b"1"})
    second = make_zip(tmp_path / "b.zip", {".DS_Store": b"2", "Thumbs.db": b"2"})
    assert fetch(root, "--archive", str(first), "--archive", str(second)) == 0
    assert contents(root / "Rain12") == files


def test_files_that_are_dropped_are_named(root, tmp_path, caplog):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    inner = {f"Rain12/{name}": content for name, content in files.items()}
    archive = make_zip(tmp_path / "a.zip", inner | {"Rain12/README": b"inner", "README": b"outer"})
    assert fetch(root, "--archive", str(archive)) == 0
    assert contents(root / "Rain12") == files | {"README": b"inner"}
    assert "README" in caplog.text


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "rainy/1.png/x.png"])
def test_names_that_cannot_be_written_are_one_line(root, tmp_path, capsys, name):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    assert fetch(root, "--archive", str(make_zip(tmp_path / "a.zip", files | {name: b"x"}))) == 2
    assert error(capsys)
    assert list(root.iterdir()) == []


def test_names_that_are_not_utf_8_are_unpacked(root, tmp_path):
    folder = make_set(tmp_path, "Rain12", "test", count=12)
    other = bytes(folder / "rainy") + b"/caf\xe9.txt"
    Path(os.fsdecode(other)).write_bytes(b"x")
    packed = shutil.make_archive(str(tmp_path / "a"), "tar", folder)
    assert fetch(root, "--archive", packed) == 0
    assert contents(root / "Rain12") == contents(folder)


def test_an_archive_that_is_far_larger_when_unpacked_is_refused(root, tmp_path, capsys):
    info = tarfile.TarInfo("rainy/1.png")
    info.size = 2**60
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert fetch(root, "--archive", str(tmp_path / "a.tar")) == 2
    assert error(capsys)
    assert not root.exists() or list(root.iterdir()) == []


def test_forms_print_the_page_and_archives_are_unpacked(root, tmp_path, capsys):
    assert fetch(root, name="rain800") == 1
    assert "https://drive.google.com" in capsys.readouterr().out
    assert fetch(root, "--dry-run", name="rain800") == 0
    source = make_set(tmp_path, "Rain800", "train", count=4)
    archive = shutil.make_archive(str(tmp_path / "download"), "gztar", tmp_path, "Rain800")
    capsys.readouterr()
    assert fetch(root, "--archive", archive, name="Rain800") == 1  # 4 pairs instead of 700
    assert "train: 4 pairs" in capsys.readouterr().out
    assert contents(root / "Rain800") == contents(source)
    assert [path.name for path in root.iterdir()] == ["Rain800"]


def test_several_archives_and_macos_metadata(root, tmp_path, capsys):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    rainy = {f"set/{name}": content for name, content in files.items() if name.startswith("rainy")}
    clean = {f"set/{name}": content for name, content in files.items() if not name.startswith("rainy")}
    first = make_zip(tmp_path / "a.zip", {**rainy, "__MACOSX/set/._1.png": b"x", "LICENSE": b"free"})
    second = make_zip(tmp_path / "b.zip", clean)
    assert fetch(root, "--archive", str(first), "--archive", str(second)) == 0
    assert contents(root / "Rain12") == {**files, "LICENSE": b"free"}


def test_an_archive_that_does_not_exist_is_named(root, tmp_path, capsys):
    assert fetch(root, "--archive", str(tmp_path / "missing.zip")) == 2
    assert error(capsys).startswith(f"derain: error: {tmp_path / 'missing.zip'}: ")
    assert not root.exists()


def test_an_archive_of_another_set_says_what_it_contains(root, tmp_path, capsys):
    archive = make_zip(tmp_path / "a.zip", {"cats/1.png": b"", "dogs/2.png": b""})
    assert fetch(root, "--archive", str(archive)) == 2
    message = error(capsys)
    assert "cats, dogs" in message
    assert not root.exists()


@pytest.mark.parametrize(
    "name", ["../outside.png", "/tmp/outside.png", "a/../../outside.png", r"..\outside.png", "C:/x"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_outside_the_archive_are_refused(root, tmp_path, capsys, name, kind):
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        make_zip(archive, {"rainy/1.png": b"x", name: b"x"})
    else:
        with tarfile.open(archive, "w") as opened:
            for path in ("rainy/1.png", name):
                opened.addfile(tarfile.TarInfo(path), io.BytesIO())
    assert fetch(root, "--archive", str(archive)) == 2
    assert repr(name) in error(capsys)
    assert not root.exists()
    assert not (tmp_path / "outside.png").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, "zip"])
def test_links_and_devices_are_refused(root, tmp_path, capsys, kind):
    archive = tmp_path / "a"
    if kind == "zip":
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        make_zip(archive, {info: "/etc/passwd"})
    else:
        info = tarfile.TarInfo("link")
        info.type = kind
        info.linkname = "/etc/passwd"
        with tarfile.open(archive, "w") as opened:
            opened.addfile(info)
    assert fetch(root, "--archive", str(archive)) == 2
    assert "'link'" in error(capsys)


@pytest.mark.parametrize("damage", ["cut zip", "cut tar", "text", "crc", "encrypted", "twice"])
def test_damaged_archives_are_one_line(root, tmp_path, capsys, damage):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    archive = make_zip(tmp_path / "a.zip", files)
    content = archive.read_bytes()
    if damage == "cut zip":
        archive.write_bytes(content[:-5000])
    elif damage == "cut tar":
        packed = Path(shutil.make_archive(str(tmp_path / "b"), "gztar", tmp_path, "Rain12"))
        archive.write_bytes(packed.read_bytes()[:-5000])
    elif damage == "text":
        archive.write_text("Quota exceeded")
    elif damage == "crc":
        archive.write_bytes(content[:2000] + bytes([content[2000] ^ 255]) + content[2001:])
    elif damage == "encrypted":
        position = content.index(b"PK\x01\x02")
        archive.write_bytes(content[: position + 8] + b"\x01" + content[position + 9 :])
    else:
        with zipfile.ZipFile(archive, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
            opened.writestr("rainy/1.png", b"again")
    assert fetch(root, "--archive", str(archive)) == 2
    assert "a.zip" in error(capsys)
    assert not root.exists() or list(root.iterdir()) == []
