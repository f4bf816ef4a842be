import errno

import pytest

pytest.importorskip("gradio")

import gradio as gr

from derain.commands.page import _head, build
from derain.commands.service import MAX_PHOTOS, RestorationService, RestoredPhotos


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    service = RestorationService({}, tmp_path)
    service.restorers["m"] = None  # nothing is restored
    return service


def _restore(service, files, refused=None):
    """Return the page's updates for files, as text."""
    functions = build(service, 1).queue.blocks.fns.values()
    restore = next(function for function in functions if function.api_name == "restore").fn
    updates = restore(files, "m", 0, 0, "full", 1, gr.Request(session_hash="s"), refused)
    return str(list(updates.values()))


def _file(tmp_path, name):
    return {"path": str(tmp_path / name), "orig_name": name}


@pytest.mark.parametrize("names", [["a.png"], ["a.png", "b.png"]])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "disk is full", "/secret/path"), "disk is full"),
        (TimeoutError("/secret"), "TimeoutError"),
    ],
)
def test_a_full_disk_is_reported_without_the_path(service, tmp_path, monkeypatch, names, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(service, "restore", fail)
    monkeypatch.setattr(service, "restore_all", fail)
    updates = _restore(service, [_file(tmp_path, name) for name in names])
    assert "role='alert'" in updates
    assert reason in updates
    assert "secret" not in updates


def test_a_photo_that_is_chosen_twice_is_reported(service, tmp_path, monkeypatch):
    restored = []

    def restore_all(uploads, **_):
        restored.extend(uploads.values())
        return RestoredPhotos([("a.png", tmp_path, tmp_path)], [], tmp_path / "derained.zip", {"time": "1 s"})

    monkeypatch.setattr(service, "restore_all", restore_all)
    updates = _restore(service, [_file(tmp_path, "a.png")] * 2)
    assert restored == ["a.png"]
    assert "1 of 2 photos" in updates
    assert "a.png: " in updates


@pytest.mark.parametrize("files", [None, []])
def test_messages_without_photos_are_shown(service, files):
    updates = _restore(service, files, ["folder: empty"])
    assert "folder: empty" in updates
    assert list(service.folder.iterdir()) == []


def test_the_script_knows_the_limits(service):
    assert f"maxMegabytes = 7, maxPhotos = {MAX_PHOTOS};" in _head(7)
