import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from derain.cli import main
from derain.commands.app import Studio, listen, load, rain_on, server_config
from derain.errors import DerainError
from derain.images import read_photo, read_rgb, write_image
from derain.methods import CLIPRPNModule, PReNetModule, weights
from tests.factories import clean_image, located
from tests.runs import start

MODEL = "w · PReNet"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    weights.save(PReNetModule(stages=1), path)
    return str(path)


@pytest.fixture
def studio(file, tmp_path):
    return Studio(load([file], "cpu"), tmp_path / "made", max_megapixels=0.01)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "rainy.png"
    write_image(path, clean_image(1, (20, 30)))
    return path


# Restoring what people give.


def test_the_download_is_what_the_method_makes_at_full_size(studio, file, tmp_path, monkeypatch):
    monkeypatch.setattr("derain.commands.app.SHOWN", 15)
    sideways = tmp_path / "from a phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(sideways, clean_image(1, (20, 30)), exif=exif)
    restored = studio.restore(sideways, "C:/photos/from a phone.jpg", MODEL)
    rgb = torch.from_numpy(read_photo(sideways).rgb).permute(2, 0, 1)[None]
    assert rgb.shape == (1, 3, 30, 20)
    with torch.no_grad():
        expected = weights.load(Path(file)).module(rgb).clamp(0, 1)[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(read_rgb(restored.download) - expected).max() <= 1
    assert restored.download.name == "from-a-phone-derained.png"
    assert read_rgb(restored.before).shape == read_rgb(restored.after).shape == (15, 10, 3)
    assert restored.facts["size"] == "20 × 30 pixels"


def test_16_bits_and_transparency_come_back(studio, tmp_path):
    path = tmp_path / "deep.png"
    alpha = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)
    photo = read_photo(_png(path, 30, 20))
    type(photo)(photo.rgb, alpha, bits=16).write(path)
    back = read_photo(studio.restore(path, "deep.png", MODEL).download)
    assert back.bits == 16
    np.testing.assert_allclose(back.alpha, alpha, atol=1e-4)


def test_one_pixel(studio, tmp_path):
    path = _png(tmp_path / "one.png", 1, 1)
    assert read_rgb(studio.restore(path, "one.png", MODEL).download).shape == (1, 1, 3)


def test_maps_route_and_scores_of_a_method_that_has_them(tmp_path, photo):
    pytest.importorskip("gradio")
    from derain.commands.page import _table

    torch.manual_seed(0)
    small = CLIPRPNModule(dim=8, blocks=(1, 1, 1, 1), refinement=1, perception="none")
    weights.save(small, tmp_path / "rpn.safetensors")
    restorers = load([str(tmp_path / "rpn.safetensors")], "cpu")
    restored = Studio(restorers, tmp_path / "made").restore(photo, "rainy.png", "rpn · CLIPRPN")
    assert list(restored.maps) == ["taken away", "mask at 1/2", "mask at 1/4", "mask at 1/8"]
    assert all(picture.shape == (20, 30, 3) for picture in restored.maps.values())
    assert restored.facts["route"] == 0
    page = _table({"route": 1, "scores": {"<b>heavy</b> rain": 0.75}})
    assert "<dd>1</dd>" in page
    assert "&lt;b&gt;heavy&lt;/b&gt; rain</span><meter min='0' max='1' value='0.7500'>" in page


def test_synthetic_rain_goes_by_amount_and_seed(studio, photo):
    rgb = read_photo(photo).rgb
    np.testing.assert_array_equal(rain_on(rgb, 50.0, 3), rain_on(rgb, 50.0, 3))
    assert not np.array_equal(rain_on(rgb, 50.0, 3), rain_on(rgb, 50.0, 4))
    large = read_photo(_png(photo.with_name("large.png"), 96, 96)).rgb
    added = [float(np.square(rain_on(large, amount, 0) - large).mean()) for amount in (10.0, 33.0, 67.0, 100.0)]
    assert added == sorted(added)
    assert added[0] > 0
    dry, wet = (studio.restore(photo, "rainy.png", MODEL, amount) for amount in (0.0, 100.0))
    np.testing.assert_allclose(read_rgb(dry.before), read_rgb(photo), atol=20)  # a JPEG of small, hard edges
    assert np.abs(read_rgb(wet.before).astype(int) - read_rgb(photo)).mean() > 10
    assert "synthetic rain" not in dry.facts
    assert wet.facts["synthetic rain"] == "100 %, seed 0"


@pytest.mark.parametrize("keep", [False, True])
def test_metadata_is_removed_unless_it_is_wanted(file, tmp_path, keep):
    studio = Studio(load([file], "cpu"), tmp_path / "made", keep_metadata=keep)
    restored = studio.restore(located(tmp_path / "located.jpg"), "located.jpg", MODEL)
    assert read_photo(restored.download).has_location is keep
    for shown in (restored.before, restored.after):
        assert not read_photo(shown).has_location


def test_a_restoration_that_nobody_waits_for_ends_between_two_layers(studio, photo):
    asked = []
    with pytest.raises(DerainError, match="nobody waits"):
        studio.restore(photo, "rainy.png", MODEL, abandoned=lambda: len(asked.append(0) or asked) > 3)
    assert len(asked) == 4
    assert not studio.folder.exists()
    assert studio.restore(photo, "rainy.png", MODEL).download.is_file()


def _png(path, width, height):
    write_image(path, clean_image(1, (height, width)))
    return path


def _head_of_png(path, width, height):
    """The head of a PNG of any size, without pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    packed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p.write_bytes(b""), "a b.png is empty: it has 0 bytes"),
        (lambda p: p.write_bytes(b"%PDF-1.7\n" * 99), "a b.png: not an image that can be read; expected a whole JPEG"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "a b.png: "),
        (lambda p: p.unlink(), "deleted after 30 minutes"),
        (lambda p: _png(p, 200, 100), "0.02 megapixels (200 × 100), and this page takes up to 0.01. The command line"),
        (lambda p: _head_of_png(p, 12_000, 9_000), "`derain restore 'a b.png' derained.png`"),
        (lambda p: _head_of_png(p, 40_000, 40_000), "more than 178 megapixels"),
    ],
)
def test_bad_files_are_answered_with_what_is_wrong(studio, photo, make, told):
    make(photo)
    with pytest.raises(DerainError) as error:
        studio.restore(photo, "a b.png", MODEL)
    assert told in str(error.value)
    assert str(photo.parent) not in str(error.value)
    assert not studio.folder.exists()


def test_an_unknown_model_is_refused(studio, photo):
    with pytest.raises(DerainError, match="no model 'x' here; choose w · PReNet"):
        studio.restore(photo, "rainy.png", "x")


def test_one_photo_at_a_time(studio, photo, monkeypatch):
    restorer = studio.restorers[MODEL]
    inside, most = 0, 0
    explain = restorer.explain

    def watched(*arguments):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return explain(*arguments)

    monkeypatch.setattr(restorer, "explain", watched)
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: studio.restore(photo, "rainy.png", MODEL), range(4)))
    assert most == 1
    assert len({restored.download for restored in done}) == 4


def test_closing_ends_a_restoration_between_two_layers(studio, photo):
    with ThreadPoolExecutor(2) as threads:
        layer = next(part for part in studio.restorers[MODEL].method.modules() if isinstance(part, torch.nn.Conv2d))
        closing = []
        layer.register_forward_hook(lambda *_: closing.append(threads.submit(studio.close)) or time.sleep(0.2))
        running = threads.submit(studio.restore, photo, "rainy.png", MODEL)
        with pytest.raises(DerainError, match="the page has ended"):
            running.result()
        closing[0].result()
    with pytest.raises(DerainError, match="the page has ended"):
        studio.restore(photo, "rainy.png", MODEL)
    assert not studio.folder.exists()


def test_weights_of_one_name_are_told_apart(file, tmp_path):
    other = tmp_path / "w.safetensors"
    shutil.copy(file, other)
    assert list(load([file, file], "cpu")) == [MODEL]
    assert list(load([file, str(other)], "cpu")) == [f"{file} · PReNet", f"{other} · PReNet"]


# The command.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-megabytes", "0"], "--max-megabytes 0: must be at least 1"),
        (["--max-megapixels", "179"], "--max-megapixels 179: must be above 0 and at most 178"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--host", "a:80"], "--host a:80: not a host name"),
        (["--allow-host", "*.example.org"], "--allow-host *.example.org: not a host name"),
        (["--trusted-proxy", "*"], "--trusted-proxy *: not an IP address"),
        (["--port", "70000"], "--port 70000"),
        (["--weights", "absent.safetensors"], "absent.safetensors: no such file"),
    ],
)
def test_refusals_take_one_line(arguments, told, capsys):
    before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    assert main(["app", *arguments]) == 2
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == before
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("proxies", "client"), [([], "127.0.0.1"), (["10.0.0.2"], "127.0.0.1"), (["127.0.0.0/8"], "192.0.2.9")]
)
def test_only_a_trusted_proxy_names_the_client(proxies, client):
    pytest.importorskip("uvicorn")
    seen = []

    async def page(scope, receive, send):
        seen.append(scope["client"][0])

    config = server_config(page, proxies)
    config.load()
    scope = {"type": "http", "asgi": {}, "client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"192.0.2.9")]}
    asyncio.run(config.loaded_app(scope, None, None))
    assert seen == [client]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_page_well(file, tmp_path, signum):
    pytest.importorskip("gradio")
    process = start("app", "--port", "0", "--weights", file, "--device", "cpu", TMPDIR=str(tmp_path))
    assert process.stdout.readline().startswith("http://")
    process.send_signal(signum)
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == 0
    assert list(tmp_path.glob("derain-app-*")) == []


def test_what_to_install_is_told(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'derain[app]'\n")


def test_nothing_is_shared_with_the_internet(capsys):
    assert main(["app", "--share"]) == 2
    assert "--share: no such option" in capsys.readouterr().err


def test_a_port_in_use_is_refused_or_passed_over(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert f"--port {port}: in use by another program" in capsys.readouterr().err
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] < second.getsockname()[1]


@pytest.fixture(scope="module")
def served(file, tmp_path_factory):
    """The page in a process of its own, its address and its folder of temporary files."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        process = start("app", "--port", "0", "--weights", file, "--device", "cpu", "--max-megabytes", "1")
    address = process.stdout.readline().split()[0]
    assert address.startswith("http://127.0.0.1:"), address + process.stdout.read()
    yield address, folder
    assert list(folder.glob("derain-app-*/*"))
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=120)[0].splitlines()
    assert [line for line in printed if "tiles" not in line] == []  # how much fits at once depends on the machine
    assert process.returncode == 0
    assert [one for one in folder.iterdir() if not one.name.startswith("torchinductor")] == []


@pytest.mark.slow
def test_two_people_at_once(served, photo, tmp_path):
    from gradio_client import Client, handle_file

    pictures = [_png(tmp_path / f"{side}.png", side, 24) for side in (30, 40)]
    clients = [Client(served[0], verbose=False, download_files=tmp_path / str(i)) for i in range(2)]

    def restore(client, path):
        return client.predict(handle_file(path), MODEL, 0, 0, api_name="/restore")

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(restore, clients, pictures))
    for path, answer in zip(pictures, answers, strict=True):
        download = next(Path(part) for part in answer if str(part).endswith("-derained.png"))
        assert download.name == f"{path.stem}-derained.png"
        assert read_rgb(download).shape == read_rgb(path).shape

    photo.write_bytes(b"")
    answer = restore(clients[0], photo)
    assert any("rainy.png is empty" in str(part) for part in answer)


def _upload(client, path):
    """Uploads a photo; its path on the server."""
    answer = client.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())})
    return answer.raise_for_status().json()[0]


def _join(client, file, **more):
    return client.post("/gradio_api/call/restore", json={"data": [file, MODEL, 0, 0], **more})


def _result(client, joined):
    return client.get(f"/gradio_api/call/restore/{joined.json()['event_id']}").text


@pytest.fixture
def client(served):
    """A program that asks the page."""
    with httpx.Client(base_url=served[0], timeout=120) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}, {"is_stream": True}])
@pytest.mark.parametrize(
    "path",
    [
        "{secret}",
        "{folder}/../secret.png",
        "{upload}/../../../secret.png",
        "{upload}/.",
        "{folder}/link.png",
        "file://{secret}",
        "http://127.0.0.1:1/secret.png",
        "{folder}",
        "",
        "\0",
    ],
)
def test_a_file_that_nobody_uploaded_is_not_read(served, client, photo, path, meta):
    folder = next(served[1].glob("derain-app-*"))
    secret = served[1] / "secret.png"
    shutil.copy(photo, secret)
    link = folder / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    named = path.format(secret=secret, folder=folder, upload=_upload(client, photo))
    for sent in ({"path": named, **meta}, {"url": "x", "value": [{"path": named, **meta}]}):
        joined = _join(client, sent)
        assert joined.status_code == 403
        assert "event_id" not in joined.text
    for private in (0, 1, 2):  # what the page's own controls call
        body = {"data": [{"path": named, **meta}, MODEL, 0, 0], "fn_index": private, "session_hash": "s"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 403
    assert client.get(f"/gradio_api/file={secret}").status_code == 403
    assert client.get(f"/gradio_api/file={link}").status_code == 403
    secret.unlink()


@pytest.mark.slow
def test_a_file_is_restored_for_the_session_that_uploaded_it_only(served, client, photo):
    assert "derained.png" in _result(client, _join(client, {"path": _upload(client, photo)}))
    with httpx.Client(base_url=served[0], timeout=120) as one, httpx.Client(base_url=served[0]) as other:
        for browser in (one, other):
            assert browser.get("/").cookies["derain-session"]
        path = _upload(one, _png(photo.with_name("own.png"), 31, 21))
        assert _join(other, {"path": path}).status_code == 403
        assert _join(client, {"path": path}).status_code == 403
        assert "derained.png" in _result(one, _join(one, {"path": path}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [["x", 0, 0], [["x"], 0, 0], [MODEL, "x", 0], [MODEL, 1e9, 0], [MODEL, 0, -1], [MODEL, 0, 1e300]]
)
def test_values_that_the_page_does_not_send_are_answered(client, photo, values):
    joined = client.post("/gradio_api/call/restore", json={"data": [{"path": _upload(client, photo)}, *values]})
    answer = _result(client, joined)
    assert "event: complete" in answer
    assert "role='alert'" in answer
    assert "-derained" not in answer


@pytest.mark.slow
def test_a_long_name_of_any_script_is_restored(client, photo):
    name = "\U0001d49c" * 250 + ".png"
    path = _upload(client, photo)
    assert "derained.png" in _result(client, _join(client, {"path": path, "orig_name": name}))
    half = json.dumps({"data": [{"path": path, "orig_name": "\ud800.png"}, MODEL, 0, 0]})
    joined = client.post("/gradio_api/call/restore", content=half, headers={"content-type": "application/json"})
    assert "derained.png" in _result(client, joined)


@pytest.mark.slow
def test_a_queue_that_nobody_listens_to_leaves_room(client, photo, tmp_path):
    slow = tmp_path / "slow.png"
    Image.new("RGB", (2400, 2400)).save(slow)
    slow_path, path = _upload(client, slow), _upload(client, photo)
    joined = [_join(client, {"path": slow_path}, session_hash=f"s{i}") for i in range(100)]
    assert {answer.status_code for answer in joined} == {200}
    waiting = client.get("/gradio_api/queue/status").json()["queue_size"]
    assert waiting <= 32
    assert _join(client, {"path": path}).status_code == 200
    answer = _result(client, joined[10])  # dropped, and says so instead of waiting for ever
    assert "event: error" in answer
    time.sleep(15)
    assert "derained.png" in _result(client, _join(client, {"path": path}))
    assert client.get("/gradio_api/queue/status").json()["queue_size"] == 0


@pytest.mark.slow
def test_the_location_is_not_in_the_download(served, client, tmp_path):
    path = located(tmp_path / "located.jpg")
    answer = _result(client, _join(client, {"path": _upload(client, path)}))
    name = re.search(r'/[^"]*-derained\.png', answer)[0]
    download = tmp_path / "restored.png"
    download.write_bytes(client.get(f"/gradio_api/file={name.removeprefix('/gradio_api/file=')}").content)
    with Image.open(download) as image:
        assert image.size == (30, 20)
        assert dict(image.getexif()) == {}


@pytest.mark.slow
def test_a_file_that_is_too_large_is_not_taken(served):
    answer = httpx.post(f"{served[0]}/gradio_api/upload", files={"files": ("big.png", bytes(1_200_000))})
    assert answer.status_code == 413


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(served, photo, tmp_path, width):
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with (
        playwright.sync_playwright() as player,
        player.chromium.launch(executable_path=CHROMIUM, args=QUIET.split()) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.set_default_timeout(120_000)
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served[0])
        page.get_by_role("heading", name="derain").wait_for()
        give = page.locator("#photo input[type=file]")

        paper = tmp_path / "paper.jpg"
        paper.write_bytes(b"%PDF-1.7\n" * 99)
        give.set_input_files(paper)
        page.get_by_text("paper.jpg: not an image that can be read").wait_for()

        give.set_input_files(photo)
        page.get_by_text("30 × 20 pixels").first.wait_for()
        assert page.locator("#slider img").count() == 2
        assert not page.locator("#note").is_visible()
        with page.expect_download() as download:
            page.get_by_text("Download PNG").click()
        assert read_rgb(download.value.path()).shape == (20, 30, 3)

        page.get_by_text("No rain in it?").click()
        added = page.get_by_text("rain added")
        for amount in ("80", "60", "40"):  # a loaded browser has lost a change made as soon as the box opened
            page.get_by_role("spinbutton").first.fill(amount)
            with contextlib.suppress(playwright.TimeoutError):
                added.wait_for(timeout=40_000)
                break
        assert added.is_visible()

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
        page.get_by_text("Drop a rainy photo here").wait_for()
        assert wrong == []
        assert {url for url in asked if not url.startswith((served[0], "data:", "blob:"))} == set()
