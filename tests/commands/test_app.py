import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from derain.cli import main
from derain.commands.app import listen, server_config
from derain.commands.service import MAX_PHOTOS
from derain.images import read_rgb, write_image
from derain.methods import PReNetModule
from tests.factories import clean_image, located
from tests.runs import start, wait_for_line

MODEL = "w · PReNet"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LISTENER_TIMEOUT = 1.0
"""Seconds after which the page in the process `served` discards jobs without listeners, from SIGUSR1 on."""
PROGRAM = f"""
import signal
import sys
import uvicorn
from derain.cli import main

startup = uvicorn.Server.startup

async def start(server, sockets=None):
    from derain.commands import guard  # not earlier: gradio reads its environment when it is imported
    signal.signal(signal.SIGUSR1, lambda *_: setattr(guard, "LISTENER_TIMEOUT", {LISTENER_TIMEOUT}))
    await startup(server, sockets)

uvicorn.Server.startup = start
sys.exit(main(sys.argv[1:]))
"""
BROWSER_OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    PReNetModule(stages=1).save_weights(path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "rainy.png"
    write_image(path, clean_image(1, (20, 30)))
    return path


def _png(path, width, height):
    write_image(path, clean_image(1, (height, width)))
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-megabytes", "0"],
        ["--max-megapixels", "179"],
        ["--host", "192.0.2.1"],
        ["--host", "a:80"],
        ["--allow-host", "*.example.org"],
        ["--trusted-proxy", "*"],
        ["--port", "70000"],
        ["--weights", "absent.safetensors"],
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # set by every command
    initial = signal.getsignal(signal.SIGTERM), dict(os.environ)
    assert main(["app", *arguments]) == 2
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == initial
    error = capsys.readouterr().err
    option, value = arguments
    assert (value if option == "--weights" else f"{option} {value}") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("proxies", "client"), [([], "127.0.0.1"), (["10.0.0.2"], "127.0.0.1"), (["127.0.0.0/8"], "192.0.2.9")]
)
def test_only_a_trusted_proxy_names_the_client(proxies, client):
    pytest.importorskip("uvicorn")
    clients = []

    async def page(scope, receive, send):
        clients.append(scope["client"][0])

    config = server_config(page, proxies)
    config.load()
    scope = {"type": "http", "asgi": {}, "client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"192.0.2.9")]}
    asyncio.run(config.loaded_app(scope, None, None))
    assert clients == [client]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])  # SIGINT: the fixture `served`
def test_signals_close_the_page(weights, tmp_path, signum):
    pytest.importorskip("gradio")
    process = start("app", "--port", "0", "--weights", weights, "--device", "cpu", TMPDIR=str(tmp_path))
    line = wait_for_line("", process)
    assert line.startswith("http://")
    process.send_signal(signum)
    assert process.communicate(timeout=120)[0].removeprefix(line) == ""
    assert process.returncode == 0
    assert list(tmp_path.glob("derain-app-*")) == []


def test_missing_gradio_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "derain[app]" in capsys.readouterr().err


def test_there_is_no_share_option(capsys):
    assert main(["app", "--share"]) == 2
    assert "--share" in capsys.readouterr().err


def test_a_given_port_in_use_is_refused_and_the_default_is_skipped(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] < second.getsockname()[1]


@pytest.fixture(scope="module")
def served(weights, tmp_path_factory):
    """Address of a page in a process, its folder of temporary files, and the process."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("temporary")
    program = tmp_path_factory.mktemp("program") / "app.py"
    program.write_text(PROGRAM)
    options = ["--port", "0", "--weights", weights, "--device", "cpu", "--max-megabytes", "1"]
    process = start("app", *options, program=(str(program),), TMPDIR=str(folder))
    line = wait_for_line("", process)
    address = line.split()[0]
    assert address.startswith("http://127.0.0.1:"), line
    yield address, folder, process
    kept = list(folder.glob("derain-app-*/*"))
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=120)[0].removeprefix(line).splitlines()
    assert kept
    assert [line for line in printed if "tiles" not in line] == []  # tiles depend on the free memory
    assert process.returncode == 0
    assert [path for path in folder.iterdir() if not path.name.startswith("torchinductor")] == []


@pytest.mark.slow
def test_two_clients_at_once(served, photo, tmp_path):
    from gradio_client import Client, handle_file

    pictures = [_png(tmp_path / f"{side}.png", side, 24) for side in (30, 40)]
    clients = [Client(served[0], verbose=False, download_files=tmp_path / str(index)) for index in range(2)]

    def restore(client, path):
        return client.predict(handle_file(path), MODEL, 0, 0, "full", 1, api_name="/restore")

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(restore, clients, pictures))
    for path, result in zip(pictures, results, strict=True):
        values = [value.get("value") for value in result if isinstance(value, dict)]
        download = next(Path(value) for value in values if str(value).endswith("-derained.png"))
        assert download.name == f"{path.stem}-derained.png"
        assert read_rgb(download).shape == read_rgb(path).shape

    photo.write_bytes(b"")
    result = restore(clients[0], photo)
    assert any("rainy.png is empty" in str(value) for value in result)


def _upload(client, path):
    """Upload a photo; return its path on the server."""
    response = client.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())})
    return response.raise_for_status().json()[0]


def _join(client, file, **fields):
    """Add a job to the queue; return the response with its id."""
    return client.post("/gradio_api/call/restore", json={"data": [file, MODEL, 0, 0, "full", 1], **fields})


def _result(client, joined):
    """Return the text of the events of a job."""
    return client.get(f"/gradio_api/call/restore/{joined.json()['event_id']}").text


@pytest.fixture
def client(served):
    """HTTP client without cookies, as programs are."""
    with httpx.Client(base_url=served[0], timeout=120, verify=False) as client:  # certificates take long to load
        yield client


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "meta"),
    [
        ("{secret}", {}),
        ("{folder}/../secret.png", {}),
        ("{upload}/../../../secret.png", {}),
        ("{upload}/.", {}),
        ("{folder}/link.png", {}),
        ("file://{secret}", {}),
        ("http://127.0.0.1:1/secret.png", {}),
        ("{folder}", {}),
        ("", {}),
        ("\0", {}),
        ("{secret}", {"meta": {"_type": "gradio.FileData"}}),
        ("{secret}", {"is_stream": True}),
    ],
)
def test_files_that_were_not_uploaded_are_refused(served, client, photo, path, meta):
    folder = next(served[1].glob("derain-app-*"))
    secret = served[1] / "secret.png"
    shutil.copy(photo, secret)
    link = folder / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    name = path.format(secret=secret, folder=folder, upload=_upload(client, photo))
    file = {"path": name, **meta}
    for value in (file, {"url": "x", "value": [file]}, [file], [{"path": _upload(client, photo)}, file]):
        joined = _join(client, value)
        assert joined.status_code == 403
        assert "event_id" not in joined.text
    for index in (0, 1, 2):  # functions of the page's controls
        body = {"data": [file, MODEL, 0, 0, "full", 1], "fn_index": index, "session_hash": "s"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 403
    assert client.get(f"/gradio_api/file={secret}").status_code == 403
    assert client.get(f"/gradio_api/file={link}").status_code == 403
    secret.unlink()


@pytest.mark.slow
def test_a_file_is_restored_only_for_its_browser(served, client, photo):
    assert "derained.png" in _result(client, _join(client, {"path": _upload(client, photo)}))
    options = {"base_url": served[0], "timeout": 120, "verify": False}
    with httpx.Client(**options) as owner, httpx.Client(**options) as stranger:
        for browser in (owner, stranger):
            assert browser.get("/").cookies["derain-session"]
        path = _upload(owner, _png(photo.with_name("own.png"), 31, 21))
        assert _join(stranger, {"path": path}).status_code == 403
        assert _join(client, {"path": path}).status_code == 403
        assert "derained.png" in _result(owner, _join(owner, {"path": path}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        ["x", 0, 0, "full", 1],
        [["x"], 0, 0, "full", 1],
        [MODEL, "x", 0, "full", 1],
        [MODEL, 1e9, 0, "full", 1],
        [MODEL, 0, -1, "full", 1],
        [MODEL, 0, 1e300, "full", 1],
        [MODEL, 0, 0, "half", 1],
        [MODEL, 0, 0, ["2"], 1],
        [MODEL, 0, 0, "full", 1.5],
        [MODEL, 0, 0, "full", "x"],
    ],
)
def test_invalid_values_end_in_an_alert(client, photo, values):
    joined = client.post("/gradio_api/call/restore", json={"data": [{"path": _upload(client, photo)}, *values]})
    events = _result(client, joined)
    assert "event: complete" in events
    assert "role='alert'" in events
    assert "-derained" not in events


@pytest.mark.slow
def test_photos_with_long_and_invalid_names_are_restored(client, photo):
    name = "\U0001d49c" * 250 + ".png"
    path = _upload(client, photo)
    assert "derained.png" in _result(client, _join(client, {"path": path, "orig_name": name}))
    lone_surrogate = json.dumps({"data": [{"path": path, "orig_name": "\ud800.png"}, MODEL, 0, 0, "full", 1]})
    headers = {"content-type": "application/json"}
    joined = client.post("/gradio_api/call/restore", content=lone_surrogate, headers=headers)
    assert "derained.png" in _result(client, joined)


@pytest.mark.slow
def test_jobs_without_listeners_make_room(served, client, photo, tmp_path):
    slow = tmp_path / "slow.png"
    Image.new("RGB", (2400, 2400)).save(slow)
    slow_path, path = _upload(client, slow), _upload(client, photo)
    joined = [_join(client, {"path": slow_path}, session_hash=f"s{index}") for index in range(50)]
    assert {response.status_code for response in joined} == {200}
    waiting = client.get("/gradio_api/queue/status").json()["queue_size"]
    assert waiting <= 32
    assert _join(client, {"path": path}).status_code == 200
    assert "event: error" in _result(client, joined[10])  # cancelled
    served[2].send_signal(signal.SIGUSR1)
    time.sleep(LISTENER_TIMEOUT)
    assert "derained.png" in _result(client, _join(client, {"path": path}))
    assert client.get("/gradio_api/queue/status").json()["queue_size"] == 0


@pytest.mark.slow
def test_downloads_have_no_location(served, client, tmp_path):
    path = located(tmp_path / "located.jpg")
    events = _result(client, _join(client, {"path": _upload(client, path)}))
    name = re.search(r'/[^"]*-derained\.png', events)[0]
    download = tmp_path / "restored.png"
    download.write_bytes(client.get(f"/gradio_api/file={name.removeprefix('/gradio_api/file=')}").content)
    with Image.open(download) as image:
        assert image.size == (30, 20)
        assert dict(image.getexif()) == {}


@pytest.mark.slow
def test_large_uploads_are_refused(served):
    response = httpx.post(f"{served[0]}/gradio_api/upload", files={"files": ("big.png", bytes(1_200_000))})
    assert response.status_code == 413


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(served, photo, tmp_path, width):
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with (
        playwright.sync_playwright() as player,
        player.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS.split()) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.set_default_timeout(120_000)
        urls, errors = [], []
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(served[0])
        page.get_by_role("heading", name="derain").wait_for()
        file_input = page.locator("#photo input[type=file]")

        document = tmp_path / "document.jpg"
        document.write_bytes(b"%PDF-1.7\n" * 99)
        file_input.set_input_files(document)
        page.get_by_text("document.jpg: not a readable image").wait_for()

        file_input.set_input_files(photo)
        page.get_by_text("30 × 20 pixels").first.wait_for()
        assert page.locator("#slider img").count() == 2
        assert not page.locator("#note").is_visible()
        with page.expect_download() as download:
            page.get_by_text("Download PNG").click()
        assert read_rgb(download.value.path()).shape == (20, 30, 3)

        several = [photo, document, _png(tmp_path / "second.png", 40, 20), tmp_path / "large.png"]
        several[-1].write_bytes(bytes(1_100_000))
        page.get_by_role("button", name="Another photo").click()
        with page.expect_file_chooser() as chooser:
            page.get_by_text("Drop rainy photos here").click()
        chooser.value.set_files(several)
        page.get_by_text("2 of 4 photos").wait_for()
        page.locator("#pairs .grid-container img").nth(3).wait_for()
        assert "document.jpg: not a readable image" in page.locator("#note").inner_text()
        assert "large.png: not uploaded" in page.locator("#note").inner_text()
        with page.expect_download() as download:
            page.get_by_text("Download ZIP").click()
        with zipfile.ZipFile(download.value.path()) as archive:
            assert archive.namelist() == ["rainy.png", "second.png"]
        page.evaluate("""async () => {
            const dataTransfer = new DataTransfer();
            for (const image of document.querySelectorAll("#pairs .grid-container img"))
                dataTransfer.items.add(new File([await (await fetch(image.src)).blob()], `${Math.random()}.jpg`));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        }""")
        page.get_by_text("4 of 4 photos").wait_for()
        assert not page.locator("#note").is_visible()

        page.evaluate("""async () => {
            const image = await (await fetch(document.querySelector("#pairs .grid-container img").src)).blob();
            const photo = {name: "a.jpg", isFile: true, file: (resolve) => resolve(new File([image], "a.jpg"))};
            const locked = {name: "locked.jpg", isFile: true, file: (_, reject) => reject(new Error("denied"))};
            const folder = (name, entries) => ({name, isDirectory: true,
                createReader: () => ({readEntries: (resolve) => resolve(entries.splice(0))})});
            const broken = {name: "broken", isDirectory: true,
                createReader: () => ({readEntries: (_, reject) => reject(new Error("denied"))})};
            const entries = [folder("photos", [photo, locked]), folder("empty", []), broken];
            const dataTransfer = new DataTransfer();
            for (const entry of entries) dataTransfer.items.add(new File([], entry.name));
            DataTransferItem.prototype.webkitGetAsEntry = () => entries.shift();
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        }""")
        page.get_by_text("1 of 4 photos").wait_for()
        for name in ("locked.jpg: ", "empty: ", "broken: "):
            assert name in page.locator("#note").inner_text()
        uploads = len([url for url in urls if url.endswith("/upload")])
        page.evaluate("choose(Array(maxPhotos + 1).fill(new File([], 'a.jpg')))")
        page.get_by_text(f"{MAX_PHOTOS + 1} photos: ").wait_for()
        assert len([url for url in urls if url.endswith("/upload")]) == uploads
        file_input.set_input_files(photo)
        page.locator("#slider").wait_for()

        page.get_by_text("Try it with a clean photo").click()
        rain_added = page.get_by_text("rain added")
        for amount in ("80", "60", "40"):  # a slow browser may lose a change made when the box opens
            page.get_by_role("spinbutton").first.fill(amount)
            with contextlib.suppress(playwright.TimeoutError):
                rain_added.wait_for(timeout=40_000)
                break
        assert rain_added.is_visible()

        page.evaluate("""async () => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 16, height: 9});
            canvas.getContext("2d").fillRect(0, 0, 9, 9);
            const blob = await new Promise((done) => canvas.toBlob(done));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([blob], "pasted.png", {type: "image/png"}));
            document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
        }""")
        page.get_by_text("16 × 9 pixels").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert "gradio" not in page.inner_text("body").lower()
        page.get_by_role("button", name="Another photo").click()
        page.get_by_text("Drop rainy photos here").wait_for()
        assert errors == []
        assert {url for url in urls if not url.startswith((served[0], "data:", "blob:"))} == set()
