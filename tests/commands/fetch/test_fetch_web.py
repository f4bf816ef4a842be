"""Data sets from archives of a web server."""

import io
import shutil
import signal
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from derain.data import web_files
from derain.data.remote_files import RemoteFile
from tests.commands.fetch.serving import contents, error, fetch, make_zip, serve_zips
from tests.factories import make_set
from tests.runs import start, wait_for
from tests.servers import running


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
    assert "unknown" in captured.out  # the size of one file
    assert "rainy.zip" in captured.err
    server.files["/rainy.zip"] = whole
    assert fetch(root) == 0
    assert contents(root / "Rain12") == files


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


def test_unreachable_server_is_one_line(server, root, capsys):
    server.server_close()
    assert fetch(root, "--from", f"{server.url}/a.zip") == 2
    assert "a.zip" in error(capsys)


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
