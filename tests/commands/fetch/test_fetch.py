"""Data sets from any source."""

import errno
import hashlib
import random
import re
import shutil
from collections import namedtuple
from pathlib import Path

import filelock
import pytest

from derain.cli import main
from derain.commands.download_summary import sources_table
from derain.data.layouts import LAYOUTS
from derain.data.sources import SOURCES, Web
from tests.commands.fetch.serving import SERVE, contents, error, fetch, serve_zips


def test_every_data_set_has_sources():
    assert set(SOURCES) == {name for name, layout in LAYOUTS.items() if layout.folders}
    for sources in SOURCES.values():
        kinds = [source.kind for source in sources]
        assert kinds
        assert len(set(kinds)) == len(kinds)  # --from names one of them
        assert kinds[-1] == "form"


def test_the_table_of_sources_in_the_documentation_is_that_of_the_code():
    page = (Path(__file__).parents[3] / "docs/fetch.md").read_text(encoding="utf-8")
    assert page.endswith(sources_table(SOURCES).markdown())


@pytest.mark.parametrize("kind", SERVE)
def test_fetch_verifies_the_complete_set(server, root, tmp_path, monkeypatch, capsys, kind):
    files = SERVE[kind](server, monkeypatch, tmp_path)
    assert fetch(root) == 0
    output = capsys.readouterr().out
    assert contents(root / "Rain12") == files
    assert [path.name for path in root.iterdir()] == ["Rain12"]
    assert "no errors" in output
    assert SOURCES["Rain12"][0].licence in output
    assert bool(re.search(r"\bother$", output, re.MULTILINE)) == (kind == "hub")  # the licence that the hub states


@pytest.mark.parametrize("kind", SERVE)
def test_dry_run_describes_and_writes_nothing(server, root, tmp_path, monkeypatch, capsys, kind):
    files = SERVE[kind](server, monkeypatch, tmp_path, **({"licence": "MIT"}))
    assert fetch(root, "--dry-run") == 0
    output = capsys.readouterr().out
    assert not root.exists()
    assert "MIT" in output
    assert f"in {2 if kind == 'web' else len(files)} files" in output
    assert ("test 12" in output) == (kind == "hub")
    assert not any(path.startswith("/datasets") for _, path, _ in server.served)


@pytest.mark.parametrize("kind", SERVE)
def test_fetch_continues_after_ten_interruptions(server, root, tmp_path, monkeypatch, capsys, kind):
    # what a broken connection has sent is lost as far as the client has only buffered it
    files = SERVE[kind](server, monkeypatch, tmp_path, **({"padding": 2_000_000} if kind == "web" else {}))
    paths = [path for path in server.files if not path.startswith("/api/")]
    total = sum(len(server.files[path]) for path in paths)
    points = sorted(random.Random(3).sample(range(1, total), 10))
    part = root / ".Rain12.part"
    continued = []
    for last, point in zip([0, *points], points, strict=False):
        server.budget = point - last
        present = contents(part / "download") if part.exists() else {}
        complete = {name for name in present if ".cache" not in name and not name.endswith(".partial")}
        server.served.clear()
        assert fetch(root) == 2
        assert "kept" in error(capsys)
        assert not (root / "Rain12").exists()
        continued += [path for _, path, has_range in server.served if has_range]
        assert complete <= set(contents(part / "download"))
        for name in complete:
            assert server.count(containing=name) == 0
    server.budget = None
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files
    assert continued or kind == "hub"  # a file of the hub that is incomplete starts again


@pytest.mark.parametrize("kind", SERVE)
def test_damage_on_the_way_is_found_and_only_damaged_files_are_fetched_again(
    server, root, tmp_path, monkeypatch, capsys, kind
):
    sha256 = {}
    files = SERVE[kind](server, monkeypatch, tmp_path)
    damaged = next(path for path in server.files if path.endswith(("rainy.zip", "rainy/3.png")))
    if kind == "web":
        (source,) = SOURCES["Rain12"]
        sha256 = tuple(hashlib.sha256(server.files[f"/{Path(url).name}"]).hexdigest() for url in source.urls)
        monkeypatch.setitem(SOURCES, "Rain12", (Web(source.urls, sha256),))
    server.corrupt = {damaged}
    assert fetch(root) == 2
    assert Path(damaged).name in error(capsys)
    assert not (root / "Rain12").exists()
    server.corrupt = set()
    server.served.clear()
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files
    fetched = [path for method, path, _ in server.served if method == "GET" and not path.startswith("/api/")]
    assert fetched == [damaged]


def test_two_processes_do_not_fetch_one_set(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    (root / ".Rain12.part").mkdir(parents=True)
    with filelock.FileLock(root / ".Rain12.part/lock"):
        assert fetch(root) == 2
    assert ".Rain12.part" in error(capsys)
    assert fetch(root) == 0


def test_a_set_that_another_process_completes_meanwhile_is_kept(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    original = filelock.FileLock.acquire

    def acquire(lock, *arguments, **options):
        (root / "Rain12").mkdir(exist_ok=True)
        return original(lock, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert fetch(root) == 2
    assert "exists" in error(capsys)
    assert server.count() == 0


@pytest.mark.parametrize("kind", SERVE)
def test_too_small_a_disk_is_refused_before_the_download(server, root, tmp_path, monkeypatch, capsys, kind):
    SERVE[kind](server, monkeypatch, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert fetch(root) == 2
    assert "1.0 kB free" in error(capsys)
    assert not root.exists()


@pytest.mark.parametrize("kind", SERVE)
def test_a_disk_that_fills_up_is_one_line_and_the_download_continues(server, root, tmp_path, monkeypatch, capsys, kind):
    files = SERVE[kind](server, monkeypatch, tmp_path)
    true_open = Path.open

    class FullFile:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            self.file.close()

        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_open(path, mode="r", *arguments, **options):
        file = true_open(path, mode, *arguments, **options)
        return FullFile(file) if "b" in mode and "r" not in mode and ".Rain12.part/download" in str(path) else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_open)
        assert fetch(root) == 2
    message = error(capsys)
    assert "disk full" in message
    assert ".Rain12.part" in message
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_an_existing_folder_is_never_replaced(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    (root / "Rain12").mkdir(parents=True)
    (root / "Rain12/notes.txt").write_text("mine")
    assert fetch(root) == 2
    assert f"{root}/Rain12: exists" in error(capsys)
    assert fetch(root, "--archive", str(tmp_path / "rainy.zip")) == 2
    assert contents(root / "Rain12") == {"notes.txt": b"mine"}


def test_a_part_of_another_source_is_refused(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    server.budget = 5000
    assert fetch(root) == 2
    server.budget = None
    capsys.readouterr()
    assert fetch(root, "--from", f"{server.url}/rainy.zip") == 2
    assert ".Rain12.part" in error(capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["Rain99", "--root", "x"], "Rain99"),
        (["folder", "--root", "x"], "folder"),
        (["Rain800", "--root", "x", "--from", "hub"], "--from hub"),
        (["Rain800", "--root", "x", "--from", "hub:one/two/three"], "hub:one/two/three"),
        (["Rain800", "--root", "x", "--from", "web", "--archive", "a.zip"], "--from web"),
        (["Rain800", "--root", "x", "--dry-run", "--archive", "a.zip"], "--dry-run"),
        (["Rain800", "--root", "x", "--archive", "missing.zip"], "missing.zip"),
        (["Rain800"], "--root"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DERAIN_DATA", raising=False)
    assert main(["data", "fetch", *options]) == 2
    assert expected in error(capsys)
    assert list(tmp_path.iterdir()) == []
