"""Access control of the page of ``derain app``: requests, files and jobs."""

import asyncio
import dataclasses
import json
import re
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gradio.data_classes import FileData
from gradio.queueing import Event, Queue
from gradio.server_messages import ProcessCompletedMessage
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from derain.commands.hosts import ANY_ADDRESS, LOCAL, host_name, host_of
from derain.commands.page_files import KEPT, PageFiles

UPLOAD = "/gradio_api/upload"
FILE = "/gradio_api/file="
JOINS = frozenset({"/gradio_api/queue/join", "/gradio_api/call/restore"})
CALLS = JOINS | {"/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset"}
RUNS = JOINS | {"/gradio_api/run/predict"}
STREAMS = re.compile(r"/gradio_api/(queue/data|(heartbeat|call/restore)/[\w.-]+)")
FIELDS = ("data", "event_data", "fn_index", "trigger_id", "session_hash")
"""Fields of a request that starts a job; other fields are removed."""

SERVED = re.compile(
    r"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info/?|app_id/?|startup-events|theme\.css|upload_progress|queue/(data|status)|file=.*)"
    r"|/gradio_api/(heartbeat|call/restore)/[\w.-]+"
)
"""Paths that the page and gradio's clients read; other paths of gradio are not served."""

CALL_BYTES = 1_000_000
"""Largest request without an upload; the page sends a few thousand bytes."""

FORM_BYTES = 65_536
"""Largest size of a form around an uploaded file."""

QUEUE = 64
"""Largest number of waiting jobs of all clients."""

PER_CLIENT = QUEUE // 2
"""Largest number of waiting jobs of one address."""

PATIENCE = 15.0
"""Seconds after which a job without a listener is abandoned."""

COOKIE = "derain-session"


@dataclasses.dataclass
class Session:
    """Session of gradio: one open page, or one call of a program.

    Attributes:
        owner: Cookie of the browser that started it.
        heard: Time when it started, or its last stream of results was closed.
        listeners: Number of open streams of results.
    """

    owner: str
    heard: float = dataclasses.field(default_factory=time.monotonic)
    listeners: int = 0

    def unheard(self) -> float:
        """Return the seconds since a stream of results was open."""
        return 0.0 if self.listeners else time.monotonic() - self.heard


class Guard:
    """ASGI application in front of gradio's, which refuses requests that the page would not send.

    Requests must come from this page (or from no page) under a known host name, which prevents DNS rebinding and
    cross-site requests. Files and jobs are accessible only to the browser that uploaded or started them. All programs
    without a cookie count as one browser.

    Args:
        app: Application of gradio.
        queue: Job queue of gradio.
        folder: Folder with uploads and restored photos.
        max_bytes: Largest upload.
        host: Address of the server.
        allowed: Further host names under which browsers may open the page.

    Raises:
        DerainError: If ``host`` or a further name is not a host name.
    """

    def __init__(
        self, app: ASGIApp, queue: Queue, folder: Path, max_bytes: int, host: str, allowed: Collection[str]
    ) -> None:
        self.app, self.queue, self.max_bytes = app, queue, max_bytes
        self.host = host if host in ANY_ADDRESS else host_name(host, "--host")
        self.allowed = {host_name(name, "--allow-host") for name in allowed}
        self.files = PageFiles(folder, QUEUE * max_bytes)
        self.sessions: dict[str, Session] = {}
        self._joining = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request, or refuse it."""
        if scope["type"] == "lifespan":
            cleaning = asyncio.create_task(self._clean_up_each_minute())
            try:
                await self.app(scope, receive, send)
            finally:
                cleaning.cancel()
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
        elif path.startswith(FILE) and not self.files.belongs(str(Path(path.removeprefix(FILE))), _cookie(request)):
            raise HTTPException(403, f"{path.removeprefix(FILE)}: not a file of this session, or already deleted")
        elif STREAMS.fullmatch(path):
            await self._stream(request, send)
        else:
            await self.app(request.scope, request.receive, _with_cookie(request, send) if path == "/" else send)

    async def _clean_up_each_minute(self) -> None:
        while True:
            await asyncio.sleep(60)
            self.clean_up()

    def clean_up(self) -> None:
        """Delete old files, and sessions that had neither jobs nor listeners for as long."""
        self.files.delete_old()
        busy = {event.session_hash for event in self.queue.event_ids_to_events.values()}
        for name, session in list(self.sessions.items()):
            if name not in busy and session.unheard() > KEPT * 60:
                del self.sessions[name]
                self.queue.pending_messages_per_session.pop(name, None)
                self.queue.pending_event_ids_session.pop(name, None)

    def _check_sender(self, request: Request) -> None:
        """Refuse a request with an unknown host name, or from another site."""
        address = request.scope["server"][0] if self.host in ANY_ADDRESS else self.host
        known = LOCAL | self.allowed | {address}
        hosts, origin = request.headers.getlist("host"), request.headers.get("origin")
        if len(hosts) != 1 or host_of(hosts[0]) not in known:
            raise HTTPException(
                403,
                f"Host {', '.join(hosts)!r}: not a host name of this page; use another one, or start the page with "
                "derain app --allow-host NAME",
            )
        site = (origin or "").partition("://")[2].lower()
        if origin is not None and site != hosts[0].lower() and host_of(site) not in self.allowed:
            raise HTTPException(403, f"Origin {origin!r}: not this page; expected a request from the page itself")

    async def _upload(self, request: Request, send: Send) -> None:
        """Forward an upload, and record the session that it belongs to."""
        answer, started = bytearray(), False

        async def recording(message: Message) -> None:
            nonlocal started
            started = started or message.get("status") == 200
            if started and message["type"] == "http.response.body":
                answer.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self.files.add(json.loads(answer), _cookie(request))
            await send(message)

        bounded = _bounded(request, self.max_bytes + FORM_BYTES)
        self._count(request, 0)

        async def receive() -> Message:
            """Read a part; gradio deletes its temporary files after this type of error."""
            try:
                message = await bounded()
                self._count(request, len(message.get("body", b"")))
            except HTTPException as refusal:
                raise MultiPartException(f"{refusal.detail}: above the maximum allowed size") from refusal
            if message["type"] == "http.disconnect":
                raise MultiPartException("the connection ended before the upload did")
            return message

        await self.app(_uncompressed(request), receive, recording)

    def _count(self, request: Request, size: int) -> None:
        address = _address(request)
        if not self.files.count(address, size):
            limit = f"{self.files.client_bytes / 1e6:,.0f} MB"
            raise HTTPException(429, f"{address} has uploaded {limit} in {KEPT} minutes; try again later")

    async def _call(self, request: Request, send: Send) -> None:
        """Forward a call, if its files belong to its session and the client may add a job."""
        path, cookie = request.scope["path"], _cookie(request)
        sent = await _json(request)
        for file in _paths(sent):
            if not self.files.belongs(file, cookie):
                raise HTTPException(403, f"{file}: not uploaded by this session, or already deleted; upload it again")
        if path in RUNS:
            sent = {field: sent[field] for field in FIELDS if field in sent}
            self._check_data(path, sent)
        if path == "/gradio_api/call/restore":
            sent["session_hash"] = (
                sent.get("session_hash") or uuid.uuid4().hex
            )  # otherwise gradio uses the name of the job
        for name in (sent.get("session_hash"), self._session_of_job(sent.get("event_id"))):
            self._claim(name, cookie)
        body = json.dumps(sent).encode()  # gradio then reads exactly what was checked
        if path in JOINS:
            async with self._joining:  # no other call may add a job in between
                self._make_room(_address(request))
                await self.app(request.scope, _whole(body, request), send)
        else:
            await self.app(request.scope, _whole(body, request), send)

    def _check_data(self, path: str, sent: dict[str, Any]) -> None:
        """Refuse a wrong number of values for a function of the page, and a first value that is not a file."""
        functions, index, data = self.queue.blocks.fns, sent.get("fn_index"), sent.get("data")
        if path == "/gradio_api/call/restore":
            function = next(function for function in functions.values() if function.api_name == "restore")
        elif isinstance(index, int) and index in functions:
            function = functions[index]
        else:
            raise HTTPException(400, f"fn_index {index!r}: not a function of this page")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise HTTPException(400, f"data: expected a list of {len(function.inputs)} values")
        if data and data[0] is not None:
            try:
                FileData.model_validate(data[0])
            except ValidationError as error:
                raise HTTPException(400, "data: the first value is not an uploaded file, with its path") from error

    def _claim(self, name: Any, cookie: str) -> None:
        """Start a session of gradio, or refuse the session of another browser."""
        if name is None:
            return
        if not isinstance(name, str):
            raise HTTPException(400, f"{name!r}: not a session or job")
        if self.sessions.setdefault(name, Session(cookie)).owner != cookie:
            raise HTTPException(403, f"session {name}: belongs to another browser")

    def _make_room(self, address: str) -> None:
        """Cancel abandoned jobs, and the oldest job without a listener if a client has too many."""
        for event in self._waiting():
            if self._is_abandoned(event):
                self._end(event)
        own = [event for event in self._waiting() if _address(event.request) == address]
        if len(own) < PER_CLIENT:
            return
        unheard = next((event for event in own if not self._session(event).listeners), None)
        if unheard is None:
            raise HTTPException(429, f"{len(own)} photos from {address} are waiting already; wait for one of them")
        self._end(unheard)

    def _waiting(self) -> list[Event]:
        """Return the jobs that have not started, the oldest first."""
        return [event for jobs in self.queue.event_queue_per_concurrency_id.values() for event in jobs.queue]

    def _session(self, event: Event) -> Session:
        return self.sessions.setdefault(event.session_hash, Session(_cookie(event.request)))

    def _is_abandoned(self, event: Event) -> bool:
        return min(time.monotonic() - event.enqueue_time, self._session(event).unheard()) > PATIENCE

    def _end(self, event: Event) -> None:
        """Remove a waiting job from the queue; running jobs call ``abandoned``."""
        self.queue.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
        self.queue.event_ids_to_events.pop(event._id, None)
        if event.session_hash in self.queue.pending_messages_per_session:  # for late listeners
            gone = ProcessCompletedMessage(output={"error": "nobody listened for the result"}, success=False)
            self.queue.send_message(event, gone)

    def abandoned(self, session: str) -> bool:
        """Return whether all jobs of a session of gradio are abandoned."""
        jobs = list(self.queue.event_ids_to_events.values())
        events = [event for event in jobs if event.session_hash == session]
        return bool(events) and all(map(self._is_abandoned, events))

    async def _stream(self, request: Request, send: Send) -> None:
        """Forward a stream of results to its browser, which may then load the files in it."""
        path, cookie = request.scope["path"], _cookie(request)
        last = path.rsplit("/", 1)[1]
        if path.startswith("/gradio_api/call/"):
            name = self._session_of_job(last)
        else:
            name = request.query_params.get("session_hash") if last == "data" else last
        session = self.sessions.get(name or "")
        if session and session.owner != cookie:
            raise HTTPException(403, f"session {name}: belongs to another browser")
        if session is None or "/heartbeat/" in path:
            await self.app(request.scope, request.receive, send)
            return
        rest = b""

        async def recording(message: Message) -> None:
            nonlocal rest
            *lines, rest = (rest + message.get("body", b"")).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    self.files.add(filter(_is_text, _paths(json.loads(line[6:]))), cookie)
            await send(message)

        session.listeners += 1
        try:
            await self.app(_uncompressed(request), request.receive, recording)
        finally:
            session.listeners -= 1
            session.heard = time.monotonic()

    def _session_of_job(self, job: Any) -> str | None:
        """Return the session of gradio of a job whose result was not read yet."""
        pending = list(self.queue.pending_event_ids_session.items())
        return next((session for session, jobs in pending if isinstance(job, str) and job in jobs), None)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _cookie(request: Request) -> str:
    """Return the cookie of a browser; empty for programs, which send none."""
    return request.cookies.get(COOKIE, "")


def _paths(sent: Any) -> Iterator[Any]:
    """Yield all values of the key ``path`` at any depth of a message."""
    waiting = [sent]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            if "path" in value:
                yield value["path"]
        elif isinstance(value, list):
            waiting += value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


async def _json(request: Request) -> dict[str, Any]:
    """Read a call."""
    try:
        sent = json.loads(await Request(request.scope, _bounded(request, CALL_BYTES)).body())
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection ended before the request did") from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is not JSON") from error
    if not isinstance(sent, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return sent


def _uncompressed(request: Request) -> Scope:
    """Return the request without its Accept-Encoding header, so that the response can be read."""
    headers = [(name, value) for name, value in request.scope["headers"] if name != b"accept-encoding"]
    return {**request.scope, "headers": headers}


def _with_cookie(request: Request, send: Send) -> Send:
    """Set a cookie in browsers that have none."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and not _cookie(request):
            cookie = f"{COOKIE}={uuid.uuid4().hex}; Path=/; HttpOnly; SameSite=Strict"
            message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
        await send(message)

    return sending


def _bounded(request: Request, limit: int) -> Receive:
    """Return a receiver that refuses requests above a size."""
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
    """Return a receiver of a body that was already read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await request.receive()

    return receive
