import errno
import hashlib
import io
import os
import random
import shutil
import signal
import tarfile
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import filelock
import pytest

from derain.cli import main
from derain.commands.download_summary import sources_table
from derain.data import web_files
from derain.data.layouts import LAYOUTS
from derain.data.remote_files import RemoteFile
from derain.data.sources import SOURCES, Hub, Web
from tests.factories import make_set
from tests.runs import start, wait_for
from tests.servers import REPOSITORY, running, serve_hub


@pytest.fixture
def server(monkeypatch):
    """A local server that also stands in for the hub; clients do not wait before they try again."""
    from huggingface_hub import constants

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(web_files, "PAUSE", 0.0)
        yield server


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def contents(folder):
    """Return the files of a folder, with their contents, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def serve_zips(server, monkeypatch, folder, *, padding=0, **arguments):
    """Serve Rain12 as one archive of rainy and one of clean images, with other files; return their contents."""
    files = contents(make_set(folder / "source", "Rain12", "test", count=12))
    files |= {f"{name}/other.bin": random.Random(name).randbytes(padding) for name in ("rainy", "groundtruth")}
    urls = []
    for name in ("rainy", "groundtruth"):
        part = {path: content for path, content in files.items() if path.startswith(name)}
        server.files[f"/{name}.zip"] = make_zip(folder / f"{name}.zip", part).read_bytes()
        server.headers[f"/{name}.zip"] = {"ETag": f'"{name}"'}
        urls.append(f"{server.url}/{name}.zip")
    monkeypatch.setitem(SOURCES, "Rain12", (Web(tuple(urls), **arguments),))
    return files


def serve_repository(server, monkeypatch, folder, **arguments):
    """Serve Rain12 as a repository of the hub; return the contents of its files."""
    source = make_set(folder / "source", "Rain12", "test", count=12)
    (source / "README.md").write_text("someone's mirror")
    serve_hub(server, source, **arguments)
    monkeypatch.setitem(SOURCES, "Rain12", (Hub(REPOSITORY),))
    return contents(source)


SERVE = {"web": serve_zips, "hub": serve_repository}


def fetch(root, *options, name="Rain12"):
    return main(["data", "fetch", name, "--root", str(root), *options])


def error(capsys):
    """Return the only line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("derain:")]
    assert len(lines) == 1
    return lines[0]


def test_every_data_set_has_sources():
    assert set(SOURCES) == {name for name, layout in LAYOUTS.items() if layout.folders}
    for sources in SOURCES.values():
        kinds = [source.kind for source in sources]
        assert kinds
        assert len(set(kinds)) == len(kinds)  # --from names one of them
        assert kinds[-1] == "form"


def test_the_table_of_sources_in_the_documentation_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs/fetch.md").read_text(encoding="utf-8")
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
    assert ("the server states: other" in output) == (kind == "hub")


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fetch_continues_after_the_end_of_the_process(tmp_path, capsys, number):
    root = tmp_path / "data"
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    with running() as server:
        server.files["/a.zip"] = make_zip(tmp_path / "a.zip", files).read_bytes()
        server.budget = 50_000
        server.stalls = True
        process = start("data", "fetch", "Rain12", "--root", root, "--from", f"{server.url}/a.zip")
        partial = root / ".Rain12.part/download/a.zip.partial"
        wait_for(partial, process)
        while partial.stat().st_size == 0:
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert ("kept" in output) == (number == signal.SIGTERM), output
        present = partial.stat().st_size
        assert 0 < present <= 50_000
        server.stalls = False
        server.budget = None
        server.served.clear()
        assert fetch(root, "--from", f"{server.url}/a.zip") == 0
        assert [(method, has_range) for method, _, has_range in server.served] == [("HEAD", False), ("GET", True)]
    assert contents(root / "Rain12") == files


@pytest.mark.slow
def test_a_download_from_the_hub_that_hangs_can_be_stopped(tmp_path):
    root = tmp_path / "data"
    source = make_set(tmp_path, "Rain12", "test", count=12)
    with running() as server:
        serve_hub(server, source)
        server.budget = 50_000
        server.stalls = True
        fetch = ["data", "fetch", "Rain12", "--root", root, "--from", f"hub:{REPOSITORY}"]
        process = start(*fetch, fresh=True, HF_ENDPOINT=server.url)
        wait_for(root / ".Rain12.part/download/rainy", process)
        while server.budget > 0:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=40)  # the hub's client notices after 10 s
    assert process.returncode == 128 + signal.SIGTERM
    assert "kept" in output


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


def test_git_checksum_of_small_files_is_checked(server, root, tmp_path, monkeypatch, capsys):
    serve_repository(server, monkeypatch, tmp_path, large=())
    (damaged,) = (path for path in server.files if path.endswith("README.md"))
    server.corrupt = {damaged}
    assert fetch(root) == 2
    assert "README.md" in error(capsys)


def test_an_archive_without_checksum_is_found_damaged_by_its_own(server, root, tmp_path, monkeypatch, capsys):
    files = serve_zips(server, monkeypatch, tmp_path)
    server.corrupt = {"/rainy.zip"}
    assert fetch(root) == 2
    assert "rainy.zip" in error(capsys)
    server.corrupt = set()
    server.served.clear()
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files
    assert [path for method, path, _ in server.served if method == "GET"] == ["/rainy.zip"]


def test_a_file_of_unknown_size_that_is_cut_is_fetched_again(server, root, tmp_path, monkeypatch, capsys):
    files = serve_zips(server, monkeypatch, tmp_path)
    whole = server.files["/rainy.zip"]
    server.announced["/rainy.zip"] = None
    server.files["/rainy.zip"] = whole[:-3000]
    assert fetch(root) == 2
    captured = capsys.readouterr()
    assert "does not state" in captured.out
    assert "rainy.zip" in captured.err
    server.files["/rainy.zip"] = whole
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_two_processes_do_not_fetch_one_set(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    (root / ".Rain12.part").mkdir(parents=True)
    with filelock.FileLock(root / ".Rain12.part/lock"):
        assert fetch(root) == 2
    assert ".Rain12.part" in error(capsys)
    assert fetch(root) == 0


def test_a_wrong_checksum_of_the_source_is_refused(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path, sha256=("0" * 64, "1" * 64))
    assert fetch(root) == 2
    assert "0" * 64 in error(capsys)
    assert not (root / "Rain12").exists()


def test_servers_without_ranges_start_again(server, root, tmp_path, monkeypatch, capsys):
    files = serve_zips(server, monkeypatch, tmp_path)
    server.ranges = False
    server.budget = 5000
    assert fetch(root) == 2
    server.budget = None
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_a_file_that_changes_between_two_calls_is_fetched_again(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    server.budget = 5000
    assert fetch(root) == 2
    (tmp_path / "new").mkdir()
    files = serve_zips(server, monkeypatch, tmp_path / "new")
    for path in server.headers:
        server.headers[path] = {"ETag": f'"new {path}"'}
    server.budget = None
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def interrupt(server, root):
    """Interrupt a download so that 5000 bytes of one archive have arrived, and forget the requests."""
    server.budget = 1
    assert fetch(root) == 2
    server.budget = None
    server.served.clear()
    partial = root / ".Rain12.part/download/rainy.zip.partial"
    partial.write_bytes(server.files["/rainy.zip"][:5000])
    return partial


def test_a_file_without_etag_that_changes_is_fetched_again(server, root, tmp_path, monkeypatch):
    serve_zips(server, monkeypatch, tmp_path, padding=20_000)
    for path in server.headers:
        server.headers[path] = {"Last-Modified": "Tue, 01 Dec 2026 10:00:00 GMT"}
    interrupt(server, root).write_bytes(bytes(5000))  # of an earlier version
    (tmp_path / "new").mkdir()
    files = serve_zips(server, monkeypatch, tmp_path / "new", padding=20_000)
    for path in server.headers:
        server.headers[path] = {"Last-Modified": "Tue, 01 Dec 2026 11:00:00 GMT"}
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_bytes_from_another_position_are_not_appended(server, root, tmp_path, monkeypatch):
    files = serve_zips(server, monkeypatch, tmp_path, padding=20_000)
    interrupt(server, root)
    server.shift = 7
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_a_download_that_never_gets_further_ends(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path, padding=2_000_000)
    server.longest = 500_000  # a client loses what it has only buffered
    server.shift = 7  # each attempt to continue is refused
    original = web_files._headers

    def count(file, position):
        assert server.count() < 50
        return original(file, position)

    monkeypatch.setattr(web_files, "_headers", count)
    assert fetch(root) == 2
    assert ".zip" in error(capsys)


def test_a_download_in_many_short_connections_is_completed(server, root, tmp_path, monkeypatch):
    files = serve_zips(server, monkeypatch, tmp_path, padding=2_000_000)
    server.longest = 500_000
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


DATE = "Tue, 01 Dec 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("version", "headers", "expected"),
    [
        (DATE, {"ETag": 'W/"1"'}, True),
        (DATE, {"ETag": 'W/"1"', "Last-Modified": DATE}, True),
        (DATE, {"ETag": 'W/"1"', "Last-Modified": DATE.replace("10:", "11:")}, False),
        ('"1"', {"Last-Modified": DATE}, True),
        ('"1"', {"ETag": '"2"', "Last-Modified": DATE}, False),
        ("5f-6", {"ETag": "5f-6", "Last-Modified": DATE}, True),
        ("5f-6", {"ETag": "5f-7", "Last-Modified": DATE}, False),
        ("", {"ETag": '"2"'}, True),
    ],
)
def test_versions_are_compared_by_the_same_header(version, headers, expected):
    file = RemoteFile("a.zip", 100, version=version)
    assert web_files._continues(file, 50, {"Content-Range": "bytes 50-99/100", **headers}) == expected


def test_bytes_of_another_version_are_not_appended(server, root, tmp_path, monkeypatch):
    files = serve_zips(server, monkeypatch, tmp_path, padding=20_000)
    server.headers["/rainy.zip"] = {"ETag": 'W/"1"'}  # weak: not sent with If-Range
    interrupt(server, root).write_bytes(bytes(5000))
    original = web_files._headers

    def change(file, position):  # after the server was asked for the version
        server.headers["/rainy.zip"] = {"ETag": 'W/"2"'}
        return original(file, position)

    monkeypatch.setattr(web_files, "_headers", change)
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_a_complete_file_of_unknown_size_is_not_asked_for_beyond_its_end(server, root, tmp_path, monkeypatch):
    files = serve_zips(server, monkeypatch, tmp_path)
    server.announced["/rainy.zip"] = None
    partial = root / ".Rain12.part/download/rainy.zip.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.files["/rainy.zip"])  # the process ended before the file was renamed
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_too_many_requests_are_repeated_after_a_pause(server, root, tmp_path, monkeypatch):
    files = serve_zips(server, monkeypatch, tmp_path)
    server.first["/rainy.zip"] = [429, 503, 408]
    server.headers["/rainy.zip"]["Retry-After"] = "0"
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


def test_a_web_page_does_not_replace_a_partial_file(server, root, tmp_path, monkeypatch, capsys):
    files = serve_zips(server, monkeypatch, tmp_path, padding=20_000)
    partial = interrupt(server, root)
    capsys.readouterr()
    present = partial.read_bytes()
    original = web_files._headers

    def signed_out(file, position):
        server.files["/rainy.zip"] = b"<html>"
        server.headers["/rainy.zip"] |= {"Content-Type": "text/html; charset=utf-8", "ETag": '"page"'}
        return original(file, position)

    with monkeypatch.context() as patch:
        patch.setattr(web_files, "_headers", signed_out)
        assert fetch(root) == 2
    assert "rainy.zip" in error(capsys)
    assert partial.read_bytes() == present
    server.files["/rainy.zip"] = (tmp_path / "rainy.zip").read_bytes()
    server.headers["/rainy.zip"] = {"ETag": '"rainy"'}
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_an_encoding_is_not_undone(server, root, tmp_path, capsys, suffix):
    folder = make_set(tmp_path, "Rain12", "test", count=12)
    packed = Path(shutil.make_archive(str(tmp_path / "a"), "gztar" if suffix == "tar.gz" else "zip", folder))
    server.files[f"/a.{suffix}"] = packed.read_bytes()
    server.headers[f"/a.{suffix}"] = {"Content-Encoding": "gzip"}
    code = fetch(root, "--from", f"{server.url}/a.{suffix}")
    if suffix == "zip":
        assert code == 2
        assert "gzip" in error(capsys)
    else:
        assert code == 0
        assert contents(root / "Rain12") == contents(folder)


def test_an_archive_whose_address_has_no_suffix_is_unpacked(server, root, tmp_path):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    server.files["/files/download"] = make_zip(tmp_path / "a.zip", files).read_bytes()
    server.files["/old"] = b""
    server.statuses["/old"] = 302
    server.headers["/old"] = {"Location": "/files/download"}
    assert fetch(root, "--from", f"{server.url}/old?id=3") == 0
    assert contents(root / "Rain12") == files


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


def test_files_beside_the_archives_of_a_repository_are_kept(server, root, tmp_path, monkeypatch):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    source = tmp_path / "repository"
    rainy = {name: content for name, content in files.items() if name.startswith("rainy")}
    source.mkdir()
    make_zip(source / "rainy.zip", rainy)
    for name, content in (files | {"LICENSE": b"MIT"}).items():
        if name not in rainy:
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(content)
    serve_hub(server, source)
    monkeypatch.setitem(SOURCES, "Rain12", (Hub(REPOSITORY),))
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files | {"LICENSE": b"MIT"}


def serve_archive_and_files(server, monkeypatch, folder, archived, loose):
    """Serve Rain12 as a repository of the hub, with files in an archive and files beside it."""
    (folder / "repository").mkdir()
    make_zip(folder / "repository/set.zip", archived)
    for name, content in loose.items():
        path = folder / "repository" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    serve_hub(server, folder / "repository")
    monkeypatch.setitem(SOURCES, "Rain12", (Hub(REPOSITORY),))


def test_other_files_that_are_also_in_the_archive_are_kept_from_there(server, root, tmp_path, monkeypatch, caplog):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    archived = files | {"LICENSE": b"MIT", "README.md": b"inner"}
    loose = {"LICENSE": b"MIT", "README.md": b"outer", "notes.txt": b"x"}
    serve_archive_and_files(server, monkeypatch, tmp_path, archived, loose)
    assert fetch(root) == 0
    assert contents(root / "Rain12") == archived | {"notes.txt": b"x"}
    assert "README.md" in caplog.text
    assert "LICENSE" not in caplog.text


@pytest.mark.parametrize("name", ["rainy/1.png", "rainy"])
def test_an_image_that_is_also_in_the_archive_is_refused(server, root, tmp_path, monkeypatch, capsys, name):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    loose = {"LICENSE": b"MIT", name: b"x"}
    serve_archive_and_files(server, monkeypatch, tmp_path, files, loose)
    assert fetch(root) == 2
    assert name in error(capsys)
    assert set(contents(root / ".Rain12.part/download")) == {"set.zip", *loose}


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


@pytest.mark.parametrize("difference", [-100, 100])
def test_a_server_that_lies_about_the_length_is_refused(server, root, tmp_path, monkeypatch, capsys, difference):
    serve_zips(server, monkeypatch, tmp_path)
    server.announced["/rainy.zip"] = len(server.files["/rainy.zip"]) + difference
    server.files["/rainy.zip"] += b"" if difference > 0 else b"more"
    assert fetch(root) == 2
    assert "rainy.zip" in error(capsys)
    assert not (root / "Rain12").exists()


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_refusals_are_one_line(server, root, tmp_path, monkeypatch, capsys, status):
    serve_zips(server, monkeypatch, tmp_path)
    server.statuses["/rainy.zip"] = status
    assert fetch(root) == 2
    assert f"HTTP {status}" in error(capsys)


def test_a_web_page_instead_of_an_archive_is_refused(server, root, tmp_path, monkeypatch, capsys):
    serve_zips(server, monkeypatch, tmp_path)
    server.headers["/rainy.zip"] = {"Content-Type": "text/html; charset=utf-8"}
    assert fetch(root) == 2
    assert "rainy.zip" in error(capsys)
    assert server.count(containing="rainy.zip") == 0


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(403, "GatedRepo", "hf auth login"), (404, "RepoNotFound", "no such data set"), (500, "", "HTTP 500")],
)
def test_refusals_of_the_hub_are_one_line(server, root, monkeypatch, capsys, status, code, expected):
    monkeypatch.setitem(SOURCES, "Rain12", (Hub(REPOSITORY),))
    path = f"/api/datasets/{REPOSITORY}/revision/main"
    server.statuses[path] = status
    server.headers[path] = {"X-Error-Code": code}
    assert fetch(root) == 2
    assert expected in error(capsys)
    assert not root.exists()


def test_offline_hub_is_one_line(root, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(root, "--from", "hub:someone/rain") == 2
    assert "HF_HUB_OFFLINE" in error(capsys)


def test_unreachable_server_is_one_line(server, root, capsys):
    server.server_close()
    assert fetch(root, "--from", f"{server.url}/a.zip") == 2
    assert "a.zip" in error(capsys)


def test_the_name_of_another_licence_is_shown(server, root, tmp_path, capsys):
    serve_hub(server, make_set(tmp_path, "Rain12", "test", count=2), license_name="research-only")
    assert fetch(root, "--from", f"hub:{REPOSITORY}", "--dry-run") == 0
    assert "research-only" in capsys.readouterr().out


def test_patterns_select_files_of_a_repository(server, root, tmp_path, monkeypatch, capsys):
    source = make_set(tmp_path, "Rain13K", "test", count=2)
    serve_hub(server, source)
    monkeypatch.setitem(SOURCES, "Test100", (Hub(REPOSITORY, patterns=("*Test100/*",)),))
    fetch(root, name="Test100")
    assert contents(root / "Test100") == contents(source / "test/Test100")
    monkeypatch.setitem(SOURCES, "Test1200", (Hub(REPOSITORY, patterns=("*Test1200/*",)),))
    assert fetch(root, name="Test1200") == 2
    assert "*Test1200/*" in error(capsys)


def test_a_repository_of_unknown_structure_is_fetched_and_reported(server, root, tmp_path, monkeypatch, capsys):
    source = make_set(tmp_path, "Rain12", "test", count=2)
    (source / "rainy").rename(source / "wet")
    serve_hub(server, source)
    monkeypatch.setitem(SOURCES, "Rain12", (Hub(REPOSITORY),))
    assert fetch(root) == 2
    captured = capsys.readouterr()
    assert "none recognised" in captured.out
    assert "groundtruth, wet" in captured.err
    assert contents(root / "Rain12") == contents(source)


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


def test_the_unpacked_size_is_checked(server, root, tmp_path, monkeypatch, capsys):
    files = contents(make_set(tmp_path, "Rain12", "test", count=12))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
        opened.writestr("zeros.bin", bytes(10**7))
    server.files["/a.zip"] = archive.getvalue()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**8, 10**8 - 10**6, 10**6))
    assert len(archive.getvalue()) < 4 * 10**5
    assert fetch(root, "--from", f"{server.url}/a.zip") == 2
    assert "1.0 MB free" in error(capsys)
    monkeypatch.undo()
    server.served.clear()
    assert fetch(root, "--from", f"{server.url}/a.zip") == 0
    assert server.count() == 0


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
