"""Requests that the page of derain app refuses before gradio reads them: by host, site, path and size."""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.queueing import Event, EventQueue
from starlette.requests import Request

from derain.commands.guard import LISTENER_TIMEOUT, MAX_CLIENT_JOBS, MAX_JOBS, Guard, Session
from derain.commands.hosts import host_name
from derain.commands.page import build
from derain.commands.page_files import KEEP_MINUTES, PageFiles
from derain.commands.service import RestorationService
from derain.errors import DerainError

OWN = "127.0.0.1:7860"


class Application:
    """ASGI application behind the guard, which records the bodies of requests."""

    def __init__(self, folder):
        self.bodies = []
        self.folder = folder

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        content = [self.new_file()] if scope["path"].endswith("upload") else {}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    def new_file(self):
        path = self.folder / "a" / f"{len(self.bodies)}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return str(path)


@pytest.fixture
def make(tmp_path):
    """Return a function that builds a guard."""

    def make(host="127.0.0.1", allowed=()):
        with gr.Blocks() as blocks:
            inputs = gr.Image(), gr.Dropdown(), gr.Slider(), gr.Number()
            inputs[0].upload(lambda *_: None, [*inputs], None, api_name="restore")
            gr.Button().click(lambda: None, None, None)
            gr.Button().click(lambda *_: None, [gr.File(file_count="multiple")], None)
        return Guard(Application(tmp_path), blocks.queue()._queue, tmp_path, 1000, host, allowed)

    return make


JOIN = "/gradio_api/queue/join"
NO_FILE = {"data": [None, "m", 0, 0], "fn_index": 0, "session_hash": "s"}


def call(path, **fields):
    """Return the body of a call that restores a file."""
    return {"data": [{"path": path}, "m", 0, 0], "fn_index": 0, "session_hash": "s", **fields}


def browser(name):
    """Return the headers of a browser."""
    return {"cookie": f"derain-session={name}"}


def request(guard, method, path, headers=(), server=OWN, **options):
    """Return the response of the guard; ``server`` is the address that received the request."""

    async def send():
        transport = httpx.ASGITransport(app=_at(guard, server))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as client:
            return await client.request(method, path, headers=dict(headers), **options)

    return asyncio.run(send())


def _at(guard, server):
    async def application(scope, receive, send):
        name, port = server.rsplit(":", 1)
        await guard({**scope, "server": (name.strip("[]"), int(port))}, receive, send)

    return application


@pytest.mark.parametrize(
    ("host", "served_at", "allowed", "status"),
    [
        ("127.0.0.1:7860", "127.0.0.1", [], 200),
        ("LOCALHOST:7860", "127.0.0.1", [], 200),
        ("localhost", "127.0.0.1", [], 200),
        ("[::1]:7860", "127.0.0.1", [], 200),
        ("box.lan:7860", "box.lan", [], 200),
        ("box.lan:7860", "Box.lan", [], 200),
        ("[fe80::1]:7860", "FE80:0::1", [], 200),
        ("box.lan:7860", "127.0.0.1", ["Box.lan"], 200),
        ("192.0.2.7:7860", "0.0.0.0", [], 200),  # the address that received the request
        ("192.0.2.8:7860", "0.0.0.0", [], 403),
        ("192.0.2.7:7860", "127.0.0.1", [], 403),
        ("evil.example:7860", "127.0.0.1", [], 403),
        ("evil.example", "0.0.0.0", [], 403),
        ("localhost.evil.example", "127.0.0.1", ["box.lan"], 403),
        ("localhost@evil.example", "127.0.0.1", [], 403),
        ("[::1", "127.0.0.1", [], 403),
        ("", "0.0.0.0", [], 403),
        ("", "", [], 403),
    ],
)
def test_hosts(make, host, served_at, allowed, status):
    guard = make(served_at, allowed)
    response = request(guard, "GET", "/config", {"host": host}, server="192.0.2.7:7860")
    assert response.status_code == status
    assert len(guard.app.bodies) == (status == 200)
    if status == 403:
        assert "--allow-host" in response.json()["detail"]


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [
        (None, [], 200),
        (f"http://{OWN}", [], 200),
        (f"https://{OWN}", [], 200),
        ("https://photos.example", ["photos.example"], 200),  # through a proxy that changes the Host header
        ("http://evil.example", [], 403),
        ("null", [], 403),
        ("", [], 403),
        ("http://localhost:3000", [], 403),  # the page of a program on this machine
        ("http://127.0.0.1:7861", ["photos.example"], 403),
        (f"http://{OWN}.evil.example", [], 403),
        (f"http://evil.example/{OWN}", [], 403),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", JOIN), ("GET", "/gradio_api/queue/data")])
def test_origins(make, origin, allowed, status, method, path):
    guard = make(allowed=allowed)
    headers = {} if origin is None else {"origin": origin}
    assert request(guard, method, path, headers, json=NO_FILE).status_code == status
    assert len(guard.app.bodies) == (status == 200)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/run/restore"),
        ("POST", "/gradio_api/api/restore"),
        ("POST", "/gradio_api/call/v2/restore"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/stream/1"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/login"),
        ("PUT", "/gradio_api/upload"),
        ("OPTIONS", "/gradio_api/upload"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/deep_link?session_hash=s"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
        ("GET", "/docs"),
    ],
)
def test_paths_that_the_page_does_not_use_are_refused(make, method, path):
    guard = make()
    assert request(guard, method, path, content=b"{}").status_code == 404
    assert guard.app.bodies == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "http://127.0.0.1/x", "file:///etc/passwd", "x.png", "{0}/../x", "{0}/%00", "", "{0}x/y"]
)
def test_files_outside_the_folder_are_refused(make, tmp_path, name):
    guard = make()
    assert request(guard, "GET", f"/gradio_api/file={name.format(tmp_path)}").status_code == 403
    assert guard.app.bodies == []


def test_uploads_are_served_only_to_their_browser(make):
    guard = make()
    (uploaded,) = request(guard, "POST", "/gradio_api/upload", browser("a"), content=b"photo").json()
    for cookie, status in ((browser("a"), 200), (browser("b"), 403), ({}, 403)):
        assert request(guard, "GET", f"/gradio_api/file={uploaded}", cookie).status_code == status
    link = Path(uploaded).with_name("link.png")
    link.symlink_to("/etc/passwd")
    guard.files.add([str(link), "/etc/passwd"], "a")
    for path in (link, "/etc/passwd"):
        assert request(guard, "GET", f"/gradio_api/file={path}", browser("a")).status_code == 403


def test_results_are_served_only_to_their_browser(make, tmp_path):
    guard = make()
    result = str(tmp_path / "results" / "a.png")
    guard.sessions["s"] = Session("a")

    async def stream_result(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        output = {"output": {"data": [{"value": {"path": result}}, {"path": None}]}}
        event = f"data: {json.dumps(output)}\n\n".encode()
        for part in (event[:30], event[30:]):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    application = guard.app
    guard.app = stream_result
    stream = "/gradio_api/queue/data?session_hash=s"
    assert request(guard, "GET", stream, browser("b")).status_code == 403
    assert request(guard, "GET", stream, browser("a")).status_code == 200
    guard.app = application
    for name, status in (("a", 200), ("b", 403)):
        assert request(guard, "GET", f"/gradio_api/file={result}", browser(name)).status_code == status


def test_only_checked_content_is_forwarded(make):
    guard = make()
    for body in (b"", b"x", b"[" * 100_000, b"\xff", b'{"path": 5}', b'{"data": [[{"path": {"a": "b"}}]]}'):
        assert request(guard, "POST", JOIN, content=body).status_code in {400, 403}
    assert guard.app.bodies == []
    (uploaded,) = request(guard, "POST", "/gradio_api/upload", content=b"photo").json()
    two_paths = json.dumps(call(uploaded, batched=True)).replace('{"path"', '{"path": "/etc/passwd", "path"')
    assert request(guard, "POST", JOIN, content=two_paths.encode()).status_code == 200
    assert json.loads(guard.app.bodies[-1]) == call(uploaded)
    assert guard.app.bodies[-1].count(b'"path"') == 1
    assert request(guard, "POST", JOIN, browser("b"), json=call(uploaded)).status_code == 403


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"data": [{"path": None}, "m", 0, 0]}, 403),
        ({"data": [{"path": 5}, "m", 0, 0]}, 403),
        ({"data": [{"path": ["{file}"]}, "m", 0, 0]}, 403),
        ({"data": [{}, "m", 0, 0]}, 400),
        ({"data": [{"url": "{file}"}, "m", 0, 0]}, 400),
        ({"data": ["{file}", "m", 0, 0]}, 400),
        ({"data": [5, "m", 0, 0]}, 400),
        ({"data": [[{"path": "{file}"}, {}], "m", 0, 0]}, 400),
        ({"data": [["{file}"], "m", 0, 0]}, 400),
        ({"data": [[{"path": "{file}"}], "m", 0, 0]}, 400),  # a list for one photo
        ({"data": [[None], "m", 0, 0]}, 400),
        ({"data": [[], "m", 0, 0]}, 400),
        ({"data": [[[{"path": "{file}"}]], "m", 0, 0]}, 400),
        ({"data": [{"path": "{file}", "orig_name": 5}, "m", 0, 0]}, 400),
        ({"data": [{"path": "{file}", "size": "x"}, "m", 0, 0]}, 400),
        ({"data": []}, 400),
        ({"data": [{"path": "{file}"}, "m", 0]}, 400),
        ({"data": [{"path": "{file}"}, "m", 0, 0, 0]}, 400),
        ({"data": {"path": "{file}"}}, 400),
        ({"data": None}, 400),
        ({"session_hash": 5}, 400),
        ({"session_hash": ["s"]}, 400),
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        JOIN,
        pytest.param("/gradio_api/call/restore", marks=pytest.mark.slow),
        pytest.param("/gradio_api/run/predict", marks=pytest.mark.slow),
    ],
)
def test_malformed_calls_are_refused(make, changed, status, path):
    guard = make()
    (uploaded,) = request(guard, "POST", "/gradio_api/upload", content=b"photo").json()
    assert request(guard, "POST", path, json=call(uploaded)).status_code == 200
    body = json.dumps(call(uploaded, **changed)).replace("{file}", uploaded)
    assert request(guard, "POST", path, content=body.encode()).status_code == status
    assert len(guard.app.bodies) == 2


SEVERAL = 2
"""Index of the function that restores several files."""


def test_several_files_are_accepted_if_all_belong_to_the_browser(make):
    guard = make()
    (uploaded,) = request(guard, "POST", "/gradio_api/upload", content=b"photo").json()
    own, other = ({"path": path, "meta": {"_type": "gradio.FileData"}} for path in (uploaded, f"{uploaded}.png"))
    for files, status in (([own, own], 200), ([], 200), ([own, other], 403)):
        body = call(uploaded, fn_index=SEVERAL, data=[files])
        assert request(guard, "POST", JOIN, json=body).status_code == status


@pytest.mark.parametrize(
    "files", ['{"path": "FILE"}', "null", "[null]", '[{"path": "FILE"}]', '[{"path": "FILE"}, null]']
)
def test_several_files_are_a_list_of_files_with_meta(make, files):
    guard = make()
    (uploaded,) = request(guard, "POST", "/gradio_api/upload", content=b"photo").json()
    body = call(uploaded, fn_index=SEVERAL, data=[json.loads(files.replace("FILE", uploaded))])
    assert request(guard, "POST", JOIN, json=body).status_code == 400
    assert len(guard.app.bodies) == 1


@pytest.mark.parametrize("index", [None, 9, -1, "0", [0], {"a": 0}])
def test_unknown_functions_are_refused(make, index):
    guard = make()
    assert request(guard, "POST", JOIN, json={**NO_FILE, "fn_index": index}).status_code == 400
    assert request(guard, "POST", JOIN, json={**NO_FILE, "fn_index": 1, "data": []}).status_code == 200


def test_a_session_belongs_to_the_browser_that_started_it(make):
    guard = make()
    event = _event(1, "127.0.0.1", 0, session="s")
    guard.queue.pending_event_ids_session["s"] = {event._id}
    requests = [
        ("POST", JOIN, NO_FILE),
        ("POST", "/gradio_api/call/restore", NO_FILE),
        ("POST", "/gradio_api/run/predict", {**NO_FILE, "fn_index": 1, "data": []}),
        ("POST", "/gradio_api/cancel", {"session_hash": "s", "fn_index": 0, "event_id": "x"}),
        ("POST", "/gradio_api/cancel", {"session_hash": "own", "fn_index": 0, "event_id": event._id}),
        ("GET", "/gradio_api/queue/data?session_hash=s", None),
        ("GET", f"/gradio_api/call/restore/{event._id}", None),
        ("GET", "/gradio_api/heartbeat/s", None),
    ]
    assert request(guard, "POST", JOIN, browser("a"), json=NO_FILE).status_code == 200
    assert request(guard, "POST", JOIN, browser("b"), json={**NO_FILE, "session_hash": "own"}).status_code == 200
    for method, path, body in requests:
        assert request(guard, method, path, browser("b"), json=body).status_code == 403, path
        assert request(guard, method, path, json=body).status_code == 403, path
    for method, path, body in requests[:4] + requests[5:]:
        assert request(guard, method, path, browser("a"), json=body).status_code == 200, path


def test_old_files_and_sessions_are_deleted(make, tmp_path, monkeypatch):
    guard = make()
    (uploaded,) = request(guard, "POST", "/gradio_api/upload", content=b"photo").json()
    incomplete = tmp_path / "tmpx"  # of an upload that was never finished
    incomplete.write_bytes(b"part")
    guard.sessions |= {"old": Session("a", time.monotonic() - KEEP_MINUTES * 60 - 1), "new": Session("a")}
    guard.sessions["open"] = Session("a", time.monotonic() - KEEP_MINUTES * 60 - 1, listeners=1)
    guard.clean_up()
    assert list(guard.sessions) == ["new", "open"]
    assert incomplete.exists()
    assert guard.files.belongs(uploaded, "")
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + KEEP_MINUTES * 60 + 1)
    guard.clean_up()
    assert not incomplete.exists()
    assert not Path(uploaded).exists()
    assert not guard.files.belongs(uploaded, "")


def test_uploads_of_a_client_are_limited(make, tmp_path, monkeypatch):
    guard = make()
    assert guard.files.client_bytes == MAX_JOBS * 1000
    guard.files = PageFiles(tmp_path, 1000)
    responses = [request(guard, "POST", "/gradio_api/upload", content=bytes(500)) for _ in range(2)]
    assert [response.status_code for response in responses] == [200, 200]
    guard.files.count("127.0.0.1", 1)
    assert request(guard, "POST", "/gradio_api/upload", content=b"x").status_code == 429
    assert guard.files.count("192.0.2.7", 1000)
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + (KEEP_MINUTES + 1) * 60)
    assert request(guard, "POST", "/gradio_api/upload", content=b"x").status_code == 200


@pytest.mark.parametrize(("path", "limit"), [("/gradio_api/upload", 66_536), (JOIN, 1_000_000)])
def test_large_requests_are_refused(make, path, limit):
    guard = make()

    async def chunks():
        for _ in range(20):
            yield bytes(100_000)

    assert request(guard, "POST", path, content=bytes(limit + 1)).status_code == 413
    if path == JOIN:  # uploads: see the next test, since gradio responds
        assert request(guard, "POST", path, content=chunks()).status_code == 413
    assert request(guard, "POST", path, {"content-length": "x"}, content=chunks()).status_code == 413
    assert guard.app.bodies == []


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page with gradio, which accepts uploads of at most 1 MB."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    service = RestorationService({}, tmp_path)
    service.restorers["m"] = None  # nothing is restored
    return build(service, 1)


FORM = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'


def test_large_uploads_leave_no_files(page, tmp_path):
    async def chunks():
        yield FORM
        for _ in range(20):
            yield bytes(100_000)
        yield b"\r\n--x--\r\n"

    form = {"content-type": "multipart/form-data; boundary=x"}
    assert request(page, "POST", "/gradio_api/upload", form, content=chunks()).status_code == 413
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_interrupted_uploads_leave_no_files(page, tmp_path):
    files = []

    async def receive():
        files.append([path for path in tmp_path.rglob("*") if path.is_file()])
        if len(files) == 1:
            return {"type": "http.request", "body": FORM + bytes(100_000), "more_body": True}
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    headers = [(b"host", OWN.encode()), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "raw_path": b"/gradio_api/upload"}
    scope |= {"headers": headers, "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"}
    scope |= {"server": ("127.0.0.1", 7860), "client": ("127.0.0.1", 1)}
    asyncio.run(page(scope, receive, send))
    assert len(files[1]) == 1  # before the end, the folder contains gradio's temporary file
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def _event(index, address, age, session=None):
    """Return a job that has waited for ``age`` seconds."""
    job_request = Request({"type": "http", "client": (address, 1), "headers": []})
    function = SimpleNamespace(concurrency_id="c", connection="sse")
    event = Event(session or f"s{index}", function, job_request, None)
    event.enqueue_time -= age
    return event


def test_photos_of_waiting_jobs_are_kept(page, tmp_path, monkeypatch):
    monkeypatch.setattr("derain.commands.page_files.KEEP_MINUTES", 0.5 / 60)
    in_call, in_state, abandoned, old = (
        tmp_path / name for name in ("call.png", "state.png", "abandoned.png", "old.png")
    )
    for path in (in_call, in_state, abandoned, old):
        path.touch()
    functions = page.queue.blocks.fns.values()
    with_photo = next(function for function in functions if function.api_name == "restore")
    with_state = next(function for function in functions if any(block.stateful for block in function.inputs))
    data = {"call": {"path": str(in_call)}, "state": None, "abandoned": {"path": str(abandoned)}}
    jobs = EventQueue("restore", 1)
    for session, file in data.items():
        event = _event(session, "127.0.0.1", 60, session)
        event.fn = with_state if session == "state" else with_photo
        event.data = SimpleNamespace(data=[file, "m", 0, 0, "full", 1])
        page.sessions[session] = _session(60, int(session != "abandoned"))
        jobs.queue.append(event)
    state = next(block for block in with_state.inputs if block.stateful)
    page.queue.blocks.state_holder["state"][state._id] = [{"path": str(in_state), "orig_name": "state.png"}]
    page.queue.event_queue_per_concurrency_id["restore"] = jobs
    time.sleep(0.6)
    page.clean_up()
    assert {path.name for path in tmp_path.glob("*.png")} == {"call.png", "state.png"}


def _session(age=0.0, listeners=0):
    return Session("", time.monotonic() - age, listeners)


@pytest.mark.parametrize(
    ("has_listener", "address", "age", "status", "waiting"),
    [
        (False, "127.0.0.1", 1, 200, MAX_CLIENT_JOBS - 1),  # the oldest is cancelled
        (False, "127.0.0.1", LISTENER_TIMEOUT + 1, 200, 0),
        (True, "127.0.0.1", LISTENER_TIMEOUT + 1, 429, MAX_CLIENT_JOBS),
        (True, "192.0.2.7", 1, 200, MAX_CLIENT_JOBS),
        (False, "192.0.2.7", LISTENER_TIMEOUT + 1, 200, 0),
    ],
)
def test_jobs_of_a_client_are_limited(make, has_listener, address, age, status, waiting):
    guard = make()
    running, *events = [_event(index, address, age) for index in range(MAX_CLIENT_JOBS + 1)]
    jobs = EventQueue("c", 1)
    jobs.queue += events
    guard.queue.event_queue_per_concurrency_id["c"] = jobs
    for event in (running, *events):
        guard.queue.event_ids_to_events[event._id] = event
        guard.sessions[event.session_hash] = _session(age, int(has_listener))
    guard.sessions["s0"].listeners = 0
    assert guard.abandoned("s1") == (age > LISTENER_TIMEOUT and not has_listener)
    assert request(guard, "POST", JOIN, json=NO_FILE).status_code == status
    assert len(jobs.queue) == len(guard.queue.event_ids_to_events) - 1 == waiting
    assert not waiting or events[-1] in jobs.queue
    assert running._id in guard.queue.event_ids_to_events
    assert guard.abandoned("s0") == (age > LISTENER_TIMEOUT)


def test_a_job_is_abandoned_some_time_after_its_stream_was_closed(make):
    guard = make()
    event = _event(1, "127.0.0.1", LISTENER_TIMEOUT + 1)
    guard.queue.event_ids_to_events[event._id] = event
    guard.queue.pending_event_ids_session["s1"] = {event._id}
    abandoned = []
    application = guard.app

    async def record_and_forward(*arguments):
        abandoned.append(guard.abandoned("s1"))
        await application(*arguments)

    guard.app = record_and_forward
    for path in ("/gradio_api/queue/data?session_hash=s1", f"/gradio_api/call/restore/{event._id}", "/config"):
        guard.sessions["s1"] = _session(LISTENER_TIMEOUT + 1)
        assert guard.abandoned("s1")
        assert request(guard, "GET", path).status_code == 200
        assert guard.abandoned("s1") == (path == "/config")  # a stream was open until now
        assert guard.sessions["s1"].listeners == 0
    assert abandoned == [False, False, True]


def test_simultaneous_calls_do_not_exceed_the_limit(make):
    guard = make()
    jobs = EventQueue("c", 1)
    guard.queue.event_queue_per_concurrency_id["c"] = jobs

    async def add_job(scope, receive, send):
        await asyncio.sleep(0)
        jobs.queue.append(_event(len(jobs.queue), "127.0.0.1", 0))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    guard.app = add_job

    async def call_at_once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url=f"http://{OWN}") as client:
            await asyncio.gather(*(client.post(JOIN, json=NO_FILE) for _ in range(MAX_CLIENT_JOBS + 8)))

    asyncio.run(call_at_once())
    assert len(jobs.queue) == MAX_CLIENT_JOBS


@pytest.mark.parametrize(
    "name",
    [
        "name:8443",
        "https://name",
        "name/path",
        "*.example.org",
        "*",
        "name.",
        ".name",
        "",
        "a b",
        "user@name",
        "-a",
        "[::1]:80",
        "a" * 64,
    ],
)
def test_invalid_host_names_are_refused(make, name):
    for option, arguments in (("--host", [name]), ("--allow-host", ["127.0.0.1", [name]])):
        if option == "--host" and not name:
            continue  # all addresses
        with pytest.raises(DerainError) as error:
            make(*arguments)
        assert f"{option} {name}:" in str(error.value)


def test_host_names_are_compared_as_browsers_send_them():
    assert host_name("[FE80:0::1]", "--host") == "fe80::1"
    assert host_name("Box.LAN", "--host") == "box.lan"


def test_a_websocket_is_refused(make):
    messages = []

    async def send(message):
        messages.append(message)

    guard = make()
    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert messages[0]["type"] == "websocket.close"
    assert guard.app.bodies == []
