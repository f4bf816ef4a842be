"""Protection of the page of ``derain app``: who may ask, for what, with which files, and how much at once."""

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradio.queueing import Event, Queue
from gradio.server_messages import ProcessCompletedMessage
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine that no other site can take."""

ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
"""Values of ``--host`` that stand for all addresses of this machine."""

UPLOAD = "/gradio_api/upload"
FILE = "/gradio_api/file="
JOINS = frozenset({"/gradio_api/queue/join", "/gradio_api/call/restore"})
CALLS = JOINS | {"/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset"}
SERVED = re.compile(
    r"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info/?|app_id/?|startup-events|theme\.css|upload_progress|queue/(data|status)|file=.*)"
    r"|/gradio_api/(heartbeat|call/restore)/[\w.-]+"
)
"""What the page and the clients of gradio read; of all else that gradio serves, nothing is needed."""

CALL_BYTES = 1_000_000
"""Largest request that is not an upload; those of the page have a few thousand bytes."""

FORM_BYTES = 65_536
"""What a form adds to the file that it carries."""

QUEUE = 64
"""Jobs that wait at once, of all clients."""

PER_CLIENT = QUEUE // 2
"""Jobs that wait at once, of one address."""

PATIENCE = 15.0
"""Seconds after which a job ends that nobody listens to."""

COOKIE = "derain-session"


class Guard:
    """ASGI application in front of gradio's; refuses what the page itself would not ask.

    Requests must come from a page that this server has served (or from no page at all) under a known host name, which
    ends DNS rebinding and cross-site requests. A file may be named only by the session that uploaded it.

    Args:
        app: The application behind.
        queue: Of gradio, which keeps the jobs.
        folder: Where uploads and restored photos are.
        max_bytes: Largest upload.
        host: Address that the page is served at.
        allowed: Further host names that the page is opened by.
    """

    def __init__(
        self, app: ASGIApp, queue: Queue, folder: Path, max_bytes: int, host: str, allowed: Collection[str]
    ) -> None:
        self.app, self.queue, self.folder, self.max_bytes = app, queue, folder, max_bytes
        self.host, self.allowed = host, {name.lower().strip("[]") for name in allowed}
        self.uploads: dict[str, set[str]] = {}
        """Sessions that uploaded a file, by its path."""
        self.listeners = Counter[str]()
        """Open streams of results, by the session of gradio."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # gradio has no websockets
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self._answer(Request(scope, receive), send)
            except HTTPException as refusal:
                response = JSONResponse({"detail": refusal.detail}, refusal.status_code)
                await response(scope, receive, send)

    async def _answer(self, request: Request, send: Send) -> None:
        path = request.scope["path"]
        self._check_sender(request)
        if request.method == "POST" and path == UPLOAD:
            await self._upload(request, send)
        elif request.method == "POST" and path in CALLS:
            await self._call(request, send)
        elif request.method not in {"GET", "HEAD"} or not SERVED.fullmatch(path):
            raise HTTPException(404, f"{request.method} {path}: not served here")
        elif path.startswith(FILE) and not self._is_ours(path.removeprefix(FILE)):
            raise HTTPException(403, f"{path.removeprefix(FILE)}: not a file of this page")
        elif session := self._stream(request):
            self.listeners[session] += 1
            try:
                await self.app(request.scope, request.receive, send)
            finally:
                self.listeners -= Counter([session])  # which drops those that have none left
        else:
            await self.app(request.scope, request.receive, _with_cookie(request, send) if path == "/" else send)

    def _check_sender(self, request: Request) -> None:
        """Refuse a request under a foreign host name, or from the page of another site."""
        address = request.scope["server"][0] if self.host in ANY_ADDRESS else self.host
        known = LOCAL | self.allowed | {address}
        hosts, origin = request.headers.getlist("host"), request.headers.get("origin")
        if len(hosts) != 1 or _name(hosts[0]) not in known:
            raise HTTPException(
                403,
                f"Host {', '.join(hosts)!r}: not a name of this page; open it under another one, or start it by "
                "derain app --allow-host NAME",
            )
        site = (origin or "").partition("://")[2].lower()
        if origin is not None and site != hosts[0].lower() and _name(site) not in self.allowed:
            raise HTTPException(403, f"Origin {origin!r}: not this page; requests from other sites are refused")

    def _is_ours(self, name: str) -> bool:
        try:
            return Path(name).is_absolute() and Path(name).resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # a name that is too long, or has a NUL in it
            return False

    async def _upload(self, request: Request, send: Send) -> None:
        """Pass an upload on, and take down whose it is."""
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"accept-encoding"]
        answer, started = bytearray(), False

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message.get("status") == 200
            if started and message["type"] == "http.response.body":
                answer.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self._note_uploads(json.loads(answer), _session(request))
            await send(message)

        receive = _bounded(request, self.max_bytes + FORM_BYTES)
        await self.app({**request.scope, "headers": headers}, receive, noting)

    def _note_uploads(self, paths: list[str], session: str) -> None:
        self.uploads = {path: owners for path, owners in self.uploads.items() if Path(path).exists()}
        for path in paths:
            self.uploads.setdefault(path, set()).add(session)

    async def _call(self, request: Request, send: Send) -> None:
        """Pass a call on, if it names only files of its session and its client has room in the queue."""
        bounded = Request(request.scope, _bounded(request, CALL_BYTES))
        body = await bounded.body()
        try:
            sent = json.loads(body)
            body = json.dumps(sent).encode()  # what was checked is what is read, whatever else the text may mean
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "the request is not JSON") from error
        for path in _paths(sent):
            if not isinstance(path, str) or _session(request) not in self.uploads.get(path, ()):
                raise HTTPException(403, f"{path}: was not uploaded from here, or is deleted; upload it again")
        if request.scope["path"] in JOINS:
            self._make_room(_address(request))
        await self.app(request.scope, _whole(body, request), send)

    def _make_room(self, address: str) -> None:
        """End jobs that nobody listens to: those of long ago, and the oldest of a client that has too many."""
        for event in self._waiting():
            if self._is_abandoned(event):
                self._end(event)
        own = [event for event in self._waiting() if _address(event.request) == address]
        if len(own) < PER_CLIENT:
            return
        unheard = next((event for event in own if not self.listeners[event.session_hash]), None)
        if unheard is None:
            raise HTTPException(429, f"{len(own)} photos from {address} are waiting already; wait for one of them")
        self._end(unheard)

    def _waiting(self) -> list[Event]:
        """Return the jobs that have not begun, the oldest first."""
        return [event for jobs in self.queue.event_queue_per_concurrency_id.values() for event in jobs.queue]

    def _is_abandoned(self, event: Event) -> bool:
        return not self.listeners[event.session_hash] and time.monotonic() - event.enqueue_time > PATIENCE

    def _end(self, event: Event) -> None:
        """Take a waiting job off the queue; one that runs asks ``abandoned``."""
        self.queue.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
        self.queue.event_ids_to_events.pop(event._id, None)
        if event.session_hash in self.queue.pending_messages_per_session:  # for a listener that is late
            gone = ProcessCompletedMessage(output={"error": "nobody listened for the result"}, success=False)
            self.queue.send_message(event, gone)

    def abandoned(self, session: str) -> bool:
        """Return whether nobody listens for the jobs of a session of gradio, and has not for a while."""
        jobs = list(self.queue.event_ids_to_events.values())
        events = [event for event in jobs if event.session_hash == session]
        return bool(events) and all(map(self._is_abandoned, events))

    def _stream(self, request: Request) -> str | None:
        """Return the session of gradio whose results a request listens to, if it does."""
        path = request.scope["path"]
        if path == "/gradio_api/queue/data":
            return request.query_params.get("session_hash")
        if path.startswith("/gradio_api/call/restore/"):
            name = path.rsplit("/", 1)[1]
            event = self.queue.event_ids_to_events.get(name)
            return event.session_hash if event else name
        return None


def _name(netloc: str) -> str:
    """Return the host name of ``name:port``, empty if there is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _session(request: Request) -> str:
    """Return who asks: the browser's cookie, or nothing for programs, which have only a file's secret path."""
    return request.cookies.get(COOKIE, "")


def _paths(sent: Any) -> Iterator[Any]:
    """Find the paths of files, however deep they are in a request."""
    waiting = [sent]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            if value.get("path") is not None:
                yield value["path"]
        elif isinstance(value, list):
            waiting += value


def _with_cookie(request: Request, send: Send) -> Send:
    """Give a browser that has none the cookie of its session."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and not _session(request):
            cookie = f"{COOKIE}={uuid.uuid4().hex}; Path=/; HttpOnly; SameSite=Strict"
            message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
        await send(message)

    return sending


def _bounded(request: Request, limit: int) -> Receive:
    """Read a request, but not beyond a limit."""
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise HTTPException(413, f"the request has more than {limit:,} bytes")
        return message

    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise HTTPException(413, f"the request has {length} bytes, and at most {limit:,} are read")
    return receive


def _whole(body: bytes, request: Request) -> Receive:
    """Hand on a body that has been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await request.receive()

    return receive
