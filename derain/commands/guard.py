"""Access control for the page of ``derain app``: hosts, origins, files, sessions and queued jobs.

A job is a call of a function of the page. It waits in Gradio's queue until it runs.
"""

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
from derain.commands.page_files import KEEP_MINUTES, PageFiles, touch

UPLOAD = "/gradio_api/upload"
FILE_PREFIX = "/gradio_api/file="
JOINS = frozenset({"/gradio_api/queue/join", "/gradio_api/call/restore"})
"""Paths of requests that add a job to the queue."""

RUNS = JOINS | {"/gradio_api/run/predict"}
"""Paths of requests that call a function of the page."""

CALLS = RUNS | {"/gradio_api/cancel", "/gradio_api/reset"}
"""Paths of POST requests with a JSON body."""

STREAMS = re.compile(r"/gradio_api/(queue/data|(heartbeat|call/restore)/[\w.-]+)")
"""Paths whose responses are streams of events."""

FIELDS = ("data", "event_data", "fn_index", "trigger_id", "session_hash")
"""Fields in the JSON body of a request in ``RUNS`` that are forwarded to Gradio; all others are removed."""

SERVED = re.compile(
    r"/|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info/?|app_id/?|startup-events|theme\.css|upload_progress|queue/(data|status)|file=.*)"
    r"|/gradio_api/(heartbeat|call/restore)/[\w.-]+"
)
"""Paths that the page and Gradio's clients request by GET or HEAD; such requests of other paths are refused."""

CALL_BYTES = 1_000_000
"""Maximum size in bytes of a JSON body."""

FORM_BYTES = 65_536
"""Maximum size in bytes of an upload form, in addition to the file in it."""

MAX_JOBS = 64
"""Maximum number of waiting jobs of all clients."""

MAX_CLIENT_JOBS = MAX_JOBS // 2
"""Maximum number of waiting jobs of one client address."""

LISTENER_TIMEOUT = 15.0
"""Seconds without a listener after which a job counts as abandoned."""

COOKIE = "derain-session"
"""Name of the cookie that identifies a browser."""


@dataclasses.dataclass
class Session:
    """Session of Gradio, of an open page or of a program that calls the page's functions.

    Attributes:
        owner: Cookie of the browser that started the session; empty for programs.
        last_open: Time when the session started or its last stream of results closed, by ``time.monotonic``, in
            seconds.
        listeners: Number of open streams of results.
    """

    owner: str
    last_open: float = dataclasses.field(default_factory=time.monotonic)
    listeners: int = 0

    def idle_seconds(self) -> float:
        """Return the seconds since ``last_open``; 0 while a stream of results is open."""
        return 0.0 if self.listeners else time.monotonic() - self.last_open


class Guard:
    """ASGI application in front of Gradio's; it refuses all requests that neither the page nor Gradio's clients send.

    The Host header of a request must be a known name. Its Origin header, if there is one, must be this page or an
    additional host name. This prevents DNS rebinding and cross-site requests. Files and jobs are accessible only to the
    browser that uploaded or started them. All programs without a cookie count as one browser.

    Args:
        app: Gradio's application.
        queue: Gradio's job queue.
        folder: Folder with uploads and restored photos.
        max_bytes: Maximum size of an uploaded file in bytes. In ``KEEP_MINUTES`` minutes, one address may upload
            ``MAX_JOBS`` times as much.
        host: Address that the server listens on.
        allowed_hosts: Additional host names of the page.

    Raises:
        DerainError: If ``host`` or an additional name is not a host name.
    """

    def __init__(
        self, app: ASGIApp, queue: Queue, folder: Path, max_bytes: int, host: str, allowed_hosts: Collection[str]
    ) -> None:
        self.app = app
        self.queue = queue
        self.max_bytes = max_bytes
        self.host = host if host in ANY_ADDRESS else host_name(host, "--host")
        self.allowed_hosts = {host_name(name, "--allow-host") for name in allowed_hosts}
        self.files = PageFiles(folder, MAX_JOBS * max_bytes)
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
        elif scope["type"] != "http":  # a websocket, which Gradio does not use
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self._respond(Request(scope, receive), send)
            except HTTPException as error:
                response = JSONResponse({"detail": error.detail}, error.status_code)
                await response(scope, receive, send)

    async def _respond(self, request: Request, send: Send) -> None:
        path = request.scope["path"]
        self._check_sender(request)
        if request.method == "POST" and path == UPLOAD:
            await self._upload(request, send)
        elif request.method == "POST" and path in CALLS:
            await self._call(request, send)
        elif request.method not in {"GET", "HEAD"} or not SERVED.fullmatch(path):
            raise HTTPException(404, f"{request.method} {path}: not served here")
        elif path.startswith(FILE_PREFIX):
            await self._serve_file(request, send)
        elif STREAMS.fullmatch(path):
            await self._stream(request, send)
        else:
            await self.app(request.scope, request.receive, _with_cookie(request, send) if path == "/" else send)

    async def _serve_file(self, request: Request, send: Send) -> None:
        """Forward a request for a file if the browser may use the file; refuse it otherwise."""
        file = request.scope["path"].removeprefix(FILE_PREFIX)
        if not self.files.belongs(str(Path(file)), _cookie(request)):
            raise HTTPException(403, f"{file}: not a file of this session, or already deleted")
        await self.app(request.scope, request.receive, send)

    async def _clean_up_each_minute(self) -> None:
        while True:
            await asyncio.sleep(60)
            self.clean_up()

    def clean_up(self) -> None:
        """Delete files that have not changed for ``KEEP_MINUTES`` minutes; forget sessions that were idle for as long.

        Photos of waiting jobs are kept unless the job is abandoned. Sessions with jobs are kept.
        """
        for event in self._waiting_jobs():
            if not self._is_abandoned(event):
                touch(self._photos(event))
        self.files.delete_old()
        with_jobs = {event.session_hash for event in self.queue.event_ids_to_events.values()}
        for name, session in list(self.sessions.items()):
            if name not in with_jobs and session.idle_seconds() > KEEP_MINUTES * 60:
                del self.sessions[name]
                self.queue.pending_messages_per_session.pop(name, None)
                self.queue.pending_event_ids_session.pop(name, None)

    def _check_sender(self, request: Request) -> None:
        """Refuse a request from another site, or without exactly one Host header with a known name."""
        address = request.scope["server"][0] if self.host in ANY_ADDRESS else self.host
        known = LOCAL | self.allowed_hosts | {address}
        hosts = request.headers.getlist("host")
        origin = request.headers.get("origin")
        if len(hosts) != 1 or host_of(hosts[0]) not in known:
            raise HTTPException(
                403,
                f"Host {', '.join(hosts)!r}: not a host name of this page; to add it, start the page with "
                "derain app --allow-host NAME",
            )
        site = (origin or "").partition("://")[2].lower()
        if origin is not None and site != hosts[0].lower() and host_of(site) not in self.allowed_hosts:
            raise HTTPException(403, f"Origin {origin!r}: not this page; expected a request from the page itself")

    async def _upload(self, request: Request, send: Send) -> None:
        """Forward an upload, and allow the browser to use the uploaded files."""
        response = bytearray()
        succeeded = False

        async def send_and_record(message: Message) -> None:
            nonlocal succeeded
            succeeded = succeeded or message.get("status") == 200
            if succeeded and message["type"] == "http.response.body":
                response.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self.files.add(json.loads(response), _cookie(request))
            await send(message)

        receive_bounded = _bounded(request, self.max_bytes + FORM_BYTES)
        self._count_upload(request, 0)

        async def receive() -> Message:
            """Receive a part of the upload; after a ``MultiPartException``, Gradio deletes what it has saved."""
            try:
                message = await receive_bounded()
                self._count_upload(request, len(message.get("body", b"")))
            except HTTPException as error:  # the words in parentheses make Gradio respond with status 413
                raise MultiPartException(f"{error.detail} (maximum allowed size)") from error
            if message["type"] == "http.disconnect":
                raise MultiPartException("the connection ended before the upload did")
            return message

        await self.app(_uncompressed(request), receive, send_and_record)

    def _count_upload(self, request: Request, size: int) -> None:
        """Count bytes of an upload; refuse it if the client has uploaded too many in ``KEEP_MINUTES`` minutes."""
        address = _address(request)
        if not self.files.count(address, size):
            limit = f"{self.files.client_bytes / 1e6:,.0f} MB"
            raise HTTPException(
                429, f"{address} has uploaded more than {limit} in {KEEP_MINUTES} minutes; try again later"
            )

    async def _call(self, request: Request, send: Send) -> None:
        """Check a call, and forward it.

        Raises:
            HTTPException: If the data of the call are invalid, its files or its session do not belong to the browser,
                or the client's address has too many jobs.
        """
        path, cookie = request.scope["path"], _cookie(request)
        call = await _read_json(request)
        for file in _paths(call):
            if not self.files.belongs(file, cookie):
                raise HTTPException(403, f"{file}: not uploaded by this session, or already deleted; upload it again")
        if path in RUNS:
            call = {field: call[field] for field in FIELDS if field in call}
            self._check_data(path, call)
        if path == "/gradio_api/call/restore" and not call.get("session_hash"):
            call["session_hash"] = uuid.uuid4().hex  # by default, Gradio would use the name of the job
        self._claim_session(call.get("session_hash"), cookie)
        self._claim_session(self._session_name(call.get("event_id")), cookie)
        body = json.dumps(call).encode()  # so that Gradio reads exactly what was checked
        if path in JOINS:
            async with self._joining:  # the queue must not grow between the check and the new job
                self._make_room(_address(request))
                await self.app(request.scope, _receive_bytes(body, request), send)
        else:
            await self.app(request.scope, _receive_bytes(body, request), send)

    def _check_data(self, path: str, call: dict[str, Any]) -> None:
        """Refuse a call of an unknown function or with a wrong number of values; also check the first value.

        The first value must be what the function's first component sends: a list of uploaded files, or one uploaded
        file or None.
        """
        functions = self.queue.blocks.fns
        index = call.get("fn_index")
        data = call.get("data")
        if path == "/gradio_api/call/restore":
            function = next(function for function in functions.values() if function.api_name == "restore")
        elif isinstance(index, int) and index in functions:
            function = functions[index]
        else:
            raise HTTPException(400, f"fn_index {index!r}: not a function of this page")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise HTTPException(400, f"data: expected a list of {len(function.inputs)} values")
        several = bool(function.inputs) and getattr(function.inputs[0], "file_count", "") == "multiple"
        files = data[0] if several else [file for file in data[:1] if file is not None]
        if not isinstance(files, list):
            raise HTTPException(400, "data: expected a list of uploaded files as the first value")
        for file in files:
            try:
                FileData.model_validate(file)
            except ValidationError as error:
                raise HTTPException(400, "data: expected paths of uploaded files as the first value") from error
            if several and "meta" not in file:  # Gradio accepts a single photo without it
                raise HTTPException(400, "data: expected the field meta of each uploaded file")

    def _claim_session(self, name: Any, cookie: str) -> None:
        """Record the owner of a new session; refuse a session that belongs to another browser."""
        if name is None:
            return
        if not isinstance(name, str):
            raise HTTPException(400, f"session {name!r}: expected text")
        if self.sessions.setdefault(name, Session(cookie)).owner != cookie:
            raise HTTPException(403, f"session {name}: belongs to another browser")

    def _make_room(self, address: str) -> None:
        """Cancel abandoned jobs; if an address still has ``MAX_CLIENT_JOBS``, cancel its oldest without a listener.

        Raises:
            HTTPException: If the address has that many jobs, and all of them have listeners.
        """
        for event in self._waiting_jobs():
            if self._is_abandoned(event):
                self._cancel(event)
        client_jobs = [event for event in self._waiting_jobs() if _address(event.request) == address]
        if len(client_jobs) < MAX_CLIENT_JOBS:
            return
        for event in client_jobs:
            if not self._session(event).listeners:
                self._cancel(event)
                return
        raise HTTPException(429, f"{len(client_jobs)} jobs from {address} are waiting; wait until one has run")

    def _waiting_jobs(self) -> list[Event]:
        """Return the jobs that have not started, oldest first."""
        return [event for jobs in self.queue.event_queue_per_concurrency_id.values() for event in jobs.queue]

    def _photos(self, event: Event) -> list[Path]:
        """Return the uploaded files of a job: those in its call, and those in its session's Gradio state."""
        values = list(event.data.data) if event.data else []
        state = self.queue.blocks.state_holder[event.session_hash]
        values += [state[block._id] for block in event.fn.inputs if block.stateful]
        return [Path(path) for path in _paths(values)]

    def _session(self, event: Event) -> Session:
        return self.sessions.setdefault(event.session_hash, Session(_cookie(event.request)))

    def _is_abandoned(self, event: Event) -> bool:
        """Return whether a job is older than ``LISTENER_TIMEOUT``, and its session had no listener for as long."""
        waited = time.monotonic() - event.enqueue_time
        return min(waited, self._session(event).idle_seconds()) > LISTENER_TIMEOUT

    def _cancel(self, event: Event) -> None:
        """Remove a waiting job from the queue; a running job stops itself when `abandoned` returns True."""
        self.queue.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
        self.queue.event_ids_to_events.pop(event._id, None)
        if event.session_hash in self.queue.pending_messages_per_session:  # for late listeners
            message = ProcessCompletedMessage(output={"error": "cancelled: no client listened"}, success=False)
            self.queue.send_message(event, message)

    def abandoned(self, session_name: str) -> bool:
        """Return whether a session has jobs and all of them are abandoned."""
        events = list(self.queue.event_ids_to_events.values())
        own_events = [event for event in events if event.session_hash == session_name]
        return bool(own_events) and all(map(self._is_abandoned, own_events))

    async def _stream(self, request: Request, send: Send) -> None:
        """Forward a stream of events unless its session belongs to another browser.

        A stream of results of a known session counts as a listener, and the browser may use the files in the results.
        """
        path, cookie = request.scope["path"], _cookie(request)
        last_part = path.rsplit("/", 1)[1]
        if path.startswith("/gradio_api/call/"):
            name = self._session_name(last_part)
        elif last_part == "data":
            name = request.query_params.get("session_hash")
        else:
            name = last_part
        session = self.sessions.get(name or "")
        if session and session.owner != cookie:
            raise HTTPException(403, f"session {name}: belongs to another browser")
        if session is None or "/heartbeat/" in path:
            await self.app(request.scope, request.receive, send)
            return
        incomplete_line = b""

        async def send_and_record(message: Message) -> None:
            nonlocal incomplete_line
            *lines, incomplete_line = (incomplete_line + message.get("body", b"")).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    paths = _paths(json.loads(line.removeprefix(b"data: ")))
                    self.files.add([path for path in paths if isinstance(path, str)], cookie)
            await send(message)

        session.listeners += 1
        try:
            await self.app(_uncompressed(request), request.receive, send_and_record)
        finally:
            session.listeners -= 1
            session.last_open = time.monotonic()

    def _session_name(self, job_id: Any) -> str | None:
        """Return the name of the session of a job whose result has not been read; None for any other value."""
        if not isinstance(job_id, str):
            return None
        pending = list(self.queue.pending_event_ids_session.items())
        return next((name for name, job_ids in pending if job_id in job_ids), None)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _cookie(request: Request) -> str:
    """Return the session cookie in a request; empty if there is none, as in requests of programs."""
    return request.cookies.get(COOKIE, "")


def _paths(content: Any) -> Iterator[Any]:
    """Yield all values of the key ``path`` at any depth of JSON content."""
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
            if "path" in value:
                yield value["path"]
        elif isinstance(value, list):
            values += value


async def _read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request.

    Raises:
        HTTPException: If the body is too large, incomplete or not a JSON object.
    """
    try:
        content = json.loads(await Request(request.scope, _bounded(request, CALL_BYTES)).body())
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection ended before the request did") from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is not valid JSON") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return content


def _uncompressed(request: Request) -> Scope:
    """Return the scope of a request without its Accept-Encoding header, so that the response can be read."""
    headers = [(name, value) for name, value in request.scope["headers"] if name != b"accept-encoding"]
    return {**request.scope, "headers": headers}


def _with_cookie(request: Request, send: Send) -> Send:
    """Return a sender that sets a session cookie if the request has none."""

    async def send_with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start" and not _cookie(request):
            cookie = f"{COOKIE}={uuid.uuid4().hex}; Path=/; HttpOnly; SameSite=Strict"
            message = dict(message, headers=[*message["headers"], (b"set-cookie", cookie.encode())])
        await send(message)

    return send_with_cookie


def _bounded(request: Request, limit: int) -> Receive:
    """Return a receiver that raises HTTPException once more than ``limit`` bytes of a request have arrived.

    Raises:
        HTTPException: If the Content-Length header is not a number or exceeds the limit.
    """
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
        raise HTTPException(413, f"the request has {length} bytes; expected at most {limit:,}")
    return receive


def _receive_bytes(body: bytes, request: Request) -> Receive:
    """Return a receiver of a new body for a request whose body has been read; further messages are the request's."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await request.receive()

    return receive
