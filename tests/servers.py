"""A local web server with faults, and a local stand-in for the Hugging Face hub."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/rain"


class Server(ThreadingHTTPServer):
    """Serves bytes by path.

    Attributes:
        files: Contents by path, which begins with ``/``.
        headers: Additional headers by path.
        statuses: Status codes by path, instead of the contents.
        announced: Lengths that are announced by path, instead of the true ones; None for none.
        corrupt: Paths whose contents are sent with one wrong byte.
        ranges: Whether ranges are served.
        shift: Number of bytes by which served ranges begin later than asked for.
        first: Status codes by path of the first requests with GET, instead of the contents.
        budget: Number of bytes of contents after which every connection is cut; None for no limit.
        longest: Number of bytes of contents after which each connection is cut; None for no limit.
        stalls: Whether connections stay open, without data, instead of being cut.
        served: Method and path of each request, and whether it asks for a range.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.headers = {}
        self.statuses = {}
        self.announced = {}
        self.corrupt = set()
        self.ranges = True
        self.shift = 0
        self.first = {}
        self.budget = None
        self.longest = None
        self.stalls = False
        self.released = threading.Event()
        self.served = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method="GET", containing=""):
        """Return the number of requests."""
        return sum(m == method and containing in path for m, path, _ in self.served)

    def handle_error(self, request, client_address):
        """Print nothing: clients close connections."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Print nothing."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        server = self.server
        path = unquote(urlsplit(self.path).path)
        server.served.append((self.command, path, "Range" in self.headers))
        if server.budget is not None and server.budget <= 0:
            return self.cut()
        first = server.first.get(path) if body else None
        if first or path in server.statuses or path not in server.files:
            self.send_response(first.pop(0) if first else server.statuses.get(path, 404))
            for name, value in server.headers.get(path, {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = server.files[path]
        headers = server.headers.get(path, {})
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        version = headers.get("ETag", headers.get("Last-Modified"))
        same = self.headers.get("If-Range", version) == version
        if match and server.ranges and same and int(match[1]) >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if match and server.ranges and same:
            start = int(match[1]) + server.shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if not server.ranges:
            self.send_header("Accept-Ranges", "none")
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        length = server.announced.get(path, len(content))
        if length is not None:
            self.send_header("Content-Length", str(length - start))
        self.end_headers()
        if body:
            self.send_content(path, content, start)
        return None

    def send_content(self, path, content, start):
        server = self.server
        if path in server.corrupt:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        for position in range(start, len(content), 1000):
            block = content[position : position + 1000]
            with server.lock:
                if server.budget is not None and not path.startswith("/api/"):
                    block = block[: max(0, server.budget)]
                    server.budget -= len(block)
            self.wfile.write(block)
            if server.longest is not None and position + 1000 - start >= server.longest:
                return self.cut()
            if server.budget is not None and server.budget <= 0:
                return self.cut()
        if path in server.announced:  # the client waits for more, or for the end of the connection
            return self.cut()
        return None

    def cut(self):
        self.wfile.flush()
        if self.server.stalls:
            self.server.released.wait()
        self.close_connection = True


@contextmanager
def running():
    """Yield a running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def serve_hub(server, folder: Path, *, repository=REPOSITORY, licence="other", large=(".png", ".jpg"), **card):
    """Serve the files of a folder as a data set of the hub; files with suffixes in ``large`` have a SHA-256."""
    card = {"license": licence, **card}
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
        etag = blob
        if path.suffix in large:
            etag = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": etag, "size": len(content), "pointerSize": 130}
        entries.append(entry)
        address = f"/datasets/{repository}/resolve/{COMMIT}/{name}"
        server.files[address] = content
        server.headers[address] = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
    info = {"id": repository, "sha": COMMIT, "private": False, "siblings": [], "cardData": card}
    info |= {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}
    for address, content in {
        f"/api/datasets/{repository}/revision/main": info,
        f"/api/datasets/{repository}/tree/{COMMIT}": entries,
    }.items():
        server.files[address] = json.dumps(content).encode()
        server.headers[address] = {"Content-Type": "application/json"}
    return len(entries)
