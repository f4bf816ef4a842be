"""What the page of derain app refuses before gradio reads it: hosts, sites, routes, sizes."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.queueing import Event, EventQueue
from starlette.requests import Request

from derain.commands.guard import PATIENCE, PER_CLIENT, Guard

OWN = "127.0.0.1:7860"


class Behind:
    """The application behind the guard: takes down what comes through."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        answer = json.dumps([f"/tmp/{len(self.bodies)}.png"] if scope["path"].endswith("upload") else {}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def make(tmp_path):
    def make(host="127.0.0.1", allowed=()):
        with gr.Blocks() as blocks:
            return Guard(Behind(), blocks.queue()._queue, tmp_path, 1000, host, allowed)

    return make


def ask(guard, method, path, headers=(), server=OWN, **more):
    """Answer of the guard; ``server`` is the address that the request comes in at."""

    async def asking():
        transport = httpx.ASGITransport(app=_at(guard, server))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as client:
            return await client.request(method, path, headers=dict(headers), **more)

    return asyncio.run(asking())


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
        ("box.lan:7860", "127.0.0.1", ["Box.lan"], 200),
        ("192.0.2.7:7860", "0.0.0.0", [], 200),  # the address that the request came in at
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
    answer = ask(guard, "GET", "/config", {"host": host}, server="192.0.2.7:7860")
    assert answer.status_code == status
    assert len(guard.app.bodies) == (status == 200)
    if status == 403:
        assert "--allow-host" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [
        (None, [], 200),
        (f"http://{OWN}", [], 200),
        (f"https://{OWN}", [], 200),
        ("https://photos.example", ["photos.example"], 200),  # a proxy that names this machine to us
        ("http://evil.example", [], 403),
        ("null", [], 403),
        ("", [], 403),
        ("http://localhost:3000", [], 403),  # another program's page
        ("http://127.0.0.1:7861", ["photos.example"], 403),
        (f"http://{OWN}.evil.example", [], 403),
        (f"http://evil.example/{OWN}", [], 403),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/queue/data")])
def test_origins(make, origin, allowed, status, method, path):
    guard = make(allowed=allowed)
    headers = {} if origin is None else {"origin": origin}
    assert ask(guard, method, path, headers, content=b"{}").status_code == status
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
def test_what_the_page_does_not_need_is_not_served(make, method, path):
    guard = make()
    assert ask(guard, method, path, content=b"{}").status_code == 404
    assert guard.app.bodies == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "http://127.0.0.1/x", "file:///etc/passwd", "x.png", "{0}/../x", "{0}/%00", "", "{0}x/y"]
)
def test_files_of_other_folders_are_not_served(make, tmp_path, name):
    guard = make()
    assert ask(guard, "GET", f"/gradio_api/file={name.format(tmp_path)}").status_code == 403
    assert guard.app.bodies == []
    assert ask(guard, "GET", f"/gradio_api/file={tmp_path}/a/b.png").status_code == 200


def test_only_what_was_checked_is_passed_on(make):
    guard = make()
    path = "/gradio_api/queue/join"
    for body in (b"", b"x", b"[" * 100_000, b"\xff", b'{"path": 5}', b'{"data": [[{"path": {"a": "b"}}]]}'):
        assert ask(guard, "POST", path, content=body).status_code in {400, 403}
    assert guard.app.bodies == []
    (uploaded,) = ask(guard, "POST", "/gradio_api/upload", content=b"photo").json()
    twice = f'{{"path": "/etc/passwd", "path": "{uploaded}"}}'
    assert ask(guard, "POST", path, content=twice.encode()).status_code == 200
    assert guard.app.bodies[-1] == json.dumps({"path": uploaded}).encode()
    cookie = {"cookie": "derain-session=other"}
    assert ask(guard, "POST", path, cookie, json={"path": uploaded}).status_code == 403


@pytest.mark.parametrize(("path", "most"), [("/gradio_api/upload", 66_536), ("/gradio_api/queue/join", 1_000_000)])
def test_requests_are_bounded(make, path, most):
    guard = make()

    async def chunks():
        for _ in range(20):
            yield bytes(100_000)

    assert ask(guard, "POST", path, content=bytes(most + 1)).status_code == 413
    assert ask(guard, "POST", path, content=chunks()).status_code == 413
    assert ask(guard, "POST", path, {"content-length": "x"}, content=chunks()).status_code == 413
    assert guard.app.bodies == []


def _event(i, address, age):
    request = Request({"type": "http", "client": (address, 1)})
    event = Event(f"s{i}", SimpleNamespace(concurrency_id="c", connection="sse"), request, None)
    event.enqueue_time -= age
    return event


@pytest.mark.parametrize(
    ("heard", "address", "age", "status", "left"),
    [
        (False, "127.0.0.1", 1, 200, PER_CLIENT - 1),  # the oldest one leaves
        (False, "127.0.0.1", PATIENCE + 1, 200, 0),
        (True, "127.0.0.1", PATIENCE + 1, 429, PER_CLIENT),
        (True, "192.0.2.7", 1, 200, PER_CLIENT),
        (False, "192.0.2.7", PATIENCE + 1, 200, 0),
    ],
)
def test_a_client_has_room_for_so_many_jobs(make, heard, address, age, status, left):
    guard = make()
    running, *events = [_event(i, address, age) for i in range(PER_CLIENT + 1)]
    guard.queue.event_ids_to_events.update({event._id: event for event in [running, *events]})
    waiting = guard.queue.event_queue_per_concurrency_id["c"] = EventQueue("c", 1)
    waiting.queue += events
    guard.listeners.update(event.session_hash for event in events if heard)
    assert guard.abandoned("s1") == (age > PATIENCE and not heard)
    assert ask(guard, "POST", "/gradio_api/queue/join", content=b"{}").status_code == status
    assert len(waiting.queue) == len(guard.queue.event_ids_to_events) - 1 == left
    assert not left or events[-1] in waiting.queue
    assert running._id in guard.queue.event_ids_to_events
    assert guard.abandoned("s0") == (age > PATIENCE)


def test_a_job_is_abandoned_when_its_stream_ends(make):
    guard = make()
    event = _event(1, "127.0.0.1", PATIENCE + 1)
    guard.queue.event_ids_to_events[event._id] = event
    heard = []
    behind = guard.app

    async def watching(*arguments):
        heard.append(not guard.abandoned("s1"))
        await behind(*arguments)

    guard.app = watching
    for path in ("/gradio_api/queue/data?session_hash=s1", f"/gradio_api/call/restore/{event._id}", "/config"):
        assert ask(guard, "GET", path).status_code == 200
        assert guard.abandoned("s1")
    assert heard == [True, True, False]
    assert guard.listeners == {}


def test_a_websocket_is_refused(make):
    sent = []

    async def send(message):
        sent.append(message)

    guard = make()
    asyncio.run(guard({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert sent[0]["type"] == "websocket.close"
    assert guard.app.bodies == []
