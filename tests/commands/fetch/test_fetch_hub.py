"""Data sets from repositories of the Hugging Face hub."""

import signal
import time

import pytest

from derain.data.sources import SOURCES, Hub
from tests.commands.fetch.serving import contents, error, fetch, make_zip, serve_repository
from tests.factories import make_set
from tests.runs import start, wait_for
from tests.servers import REPOSITORY, running, serve_hub


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


def test_git_checksum_of_small_files_is_checked(server, root, tmp_path, monkeypatch, capsys):
    serve_repository(server, monkeypatch, tmp_path, large=())
    (damaged,) = (path for path in server.files if path.endswith("README.md"))
    server.corrupt = {damaged}
    assert fetch(root) == 2
    assert "README.md" in error(capsys)


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


def test_the_name_of_another_licence_is_shown(server, root, tmp_path, capsys):
    serve_hub(server, make_set(tmp_path, "Rain12", "test", count=2), license_name="research-only")
    assert fetch(root, "--from", f"hub:{REPOSITORY}", "--dry-run") == 0
    assert "research-only" in capsys.readouterr().out


def test_a_repository_without_files_is_refused(server, root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    serve_hub(server, tmp_path / "empty")
    assert fetch(root, "--from", f"hub:{REPOSITORY}") == 2
    message = error(capsys)
    assert message.startswith(f"derain: error: hub:{REPOSITORY}: ")
    assert f"--from hub:{REPOSITORY}" not in message  # fetches the same empty repository


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
