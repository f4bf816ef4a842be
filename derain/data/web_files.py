"""Files of web servers: ask for their sizes, and download them in parallel; interrupted downloads are continued."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import unquote, urlsplit

from derain.data.remote_files import Listing, RemoteFile, partial_path
from derain.errors import DerainError

WEB_PAGE = "text/html"
"""Content type of web pages."""

WORKERS = 4
"""Number of files that are downloaded at the same time."""

BLOCK = 2**18
"""Number of bytes that are written at a time."""

ATTEMPTS = 5
"""Number of consecutive attempts without progress after which a download fails."""

PAUSE = 2.0
"""Seconds before another attempt if the server does not ask for a pause."""

REFUSED = frozenset(range(400, 500)) - {408, 425, 429}
"""HTTP status codes of requests that would fail again; 408, 425 and 429 ask for another attempt later."""

BEYOND_THE_END = 416
"""HTTP status code of a request for bytes that begin at or after the end of the file."""

MAX_PAUSE = 60.0
"""Maximum number of seconds to wait if a server asks for a pause."""

COMPRESSED = (".gz", ".tgz")
"""Endings of files that are compressed themselves: a server may correctly send them with a Content-Encoding."""

OTHER_ARCHIVES = (".rar", ".7z", ".zst")
"""Endings of archives that derain cannot unpack."""


def list_urls(urls: Sequence[str], checksums: Sequence[str] = ()) -> Listing:
    """Ask the servers for size and version of files.

    Args:
        urls: Addresses of the files.
        checksums: SHA-256 of each file in hexadecimal digits; empty if unknown.

    Raises:
        DerainError: If a server cannot be reached, refuses, or answers with a web page; if a file is an archive that
            derain cannot unpack; or if two files have the same name.
    """
    files = []
    system = _file_system()
    for url, sha256 in zip(urls, checksums or [""] * len(urls), strict=True):
        try:
            info = system.info(url)
        except FileNotFoundError as error:
            raise _unreachable(url, error.__cause__ or error) from error
        if info.get("mimetype") == WEB_PAGE:
            raise _web_page(url)
        name = PurePosixPath(unquote(urlsplit(url).path)).name or "download"
        if name.lower().endswith(OTHER_ARCHIVES):
            raise DerainError(
                f"{url}: not a zip or tar archive; download it in a browser, and unpack it into a folder of the data "
                "root that is named like the set"
            )
        files.append(RemoteFile(name, info["size"], sha256, url=url, version=_version(info)))
    names = [file.path for file in files]
    if len(set(names)) < len(names):
        raise DerainError(
            f"{', '.join(urls)}: two files have the same name; download them in a browser, then --archive"
        )
    return Listing(" ".join(urls), tuple(files))


def download_urls(files: Sequence[RemoteFile], folder: Path, advance: Callable[[int], None]) -> None:
    """Download files; those that are complete are kept, and partial ones are continued.

    Args:
        files: The files, as `list_urls` returns them.
        folder: Download folder; a file is called ``NAME.partial`` until it is complete.
        advance: Called with numbers of new bytes, which are negative if a file starts again.

    Raises:
        DerainError: If a server refuses, fails several times in a row, or sends a web page, an unexpected
            Content-Encoding, or more bytes than it announced.
        OSError: If a file cannot be written.
    """
    downloader = _Downloader(folder, advance)
    with ThreadPoolExecutor(WORKERS) as threads:
        futures = [threads.submit(downloader.download, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            downloader.stop()
            for future in futures:
                future.cancel()
            raise


def _version(headers: Mapping[str, str]) -> str:
    """Return the server's identifier of the version of a file: ETag or date; empty if it has none.

    Equal weak ETags do not guarantee equal bytes, so that the date is preferred to a weak ETag.
    """
    etag, date = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if etag.startswith("W/"):
        return date or etag
    return etag or date


def _web_page(url: str) -> DerainError:
    return DerainError(f"{url}: answers with a web page instead of an archive; download the file in a browser")


def _file_system() -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    # Files are saved as they are sent; after decompression, sizes and positions would differ from those of the server.
    options = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
    return HTTPFileSystem(client_kwargs=options, skip_instance_cache=True)


class _Downloader:
    """Downloads files into a folder, each in a thread of its own."""

    def __init__(self, folder: Path, advance: Callable[[int], None]) -> None:
        self.folder = folder
        self.advance = advance
        self.system = _file_system()
        self.stopped = Event()
        self.responses: list[Any] = []

    def stop(self) -> None:
        """End the downloads of all threads, including those that wait for data."""
        self.stopped.set()
        for response in self.responses:
            self.system.loop.call_soon_threadsafe(response.close)

    def download(self, file: RemoteFile) -> None:
        """Download a file, in several attempts if the connection breaks; return early after `stop`."""
        import aiohttp

        target = self.folder / file.path
        if target.is_file():
            return
        partial = partial_path(target)
        partial.touch()
        failures, furthest = 0, partial.stat().st_size
        while not self.stopped.is_set():
            size = partial.stat().st_size
            try:
                if self._receive(file, partial):
                    partial.rename(target)
                    return
                reason: Exception = ConnectionError("connection closed early")
            except FileNotFoundError as error:
                raise _unreachable(file.url, error) from error
            except (aiohttp.ClientError, TimeoutError) as error:
                status = getattr(error, "status", 0)
                if status == BEYOND_THE_END and size:
                    self._restart(partial)
                elif status in REFUSED:
                    raise _unreachable(file.url, error) from error
                reason = error
            arrived = partial.stat().st_size
            failures = 0 if arrived > furthest else failures + 1
            furthest = max(furthest, arrived)
            if failures == ATTEMPTS:
                raise _unreachable(file.url, reason) from reason
            self.stopped.wait(_pause(reason))

    def _restart(self, partial: Path) -> None:
        """Delete the contents of a partial file."""
        self.advance(-partial.stat().st_size)
        partial.write_bytes(b"")

    def _receive(self, file: RemoteFile, partial: Path) -> bool:
        """Append the missing bytes to a partial file; return whether it is complete.

        If the server does not support ranges, or has another version of the file by now, the download starts again.
        """
        position = partial.stat().st_size
        if file.size is not None and position == file.size:
            return True
        unused_size = 1  # without a size, fsspec asks the server again
        request_headers = _headers(file, position)
        with self.system.open(file.url, block_size=0, size=unused_size, headers=request_headers) as response:
            self.responses.append(response.r)
            headers = response.r.headers
            if headers.get("Content-Type", "").startswith(WEB_PAGE):
                raise _web_page(file.url)
            encoding = headers.get("Content-Encoding", "identity")
            if encoding not in ("", "identity") and not file.path.lower().endswith(COMPRESSED):
                raise DerainError(
                    f"{file.url}: the server sends the file compressed ({encoding}), which was not requested; "
                    "download the file in a browser, then --archive"
                )
            continued = position > 0 and response.r.status == 206
            if continued and not _continues(file, position, headers):
                self._restart(partial)
                return False
            if position and not continued:
                self.advance(-position)
                position = 0
            with partial.open("ab" if continued else "wb") as output:
                while not self.stopped.is_set() and (block := response.read(BLOCK)):
                    output.write(block)
                    position += len(block)
                    self.advance(len(block))
                    if file.size is not None and position > file.size:
                        break
        if file.size is not None and position > file.size:
            partial.unlink()
            raise DerainError(
                f"{file.url}: the server sent more than the {file.size} bytes that it announced; the partial file "
                "was deleted; run the same command again"
            )
        return not self.stopped.is_set() and file.size in (None, position)


def _continues(file: RemoteFile, position: int, headers: Mapping[str, str]) -> bool:
    """Return whether a partial answer begins at a position, and names no other size or version of the file."""
    announced = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    if announced is None or int(announced[1]) != position:
        return False
    if file.size is not None and announced[2] not in ("*", str(file.size)):
        return False
    # An ETag cannot be recognised by its quotes, since some servers omit them.
    kind = "Last-Modified" if parsedate(file.version) else "ETag"
    return not file.version or headers.get(kind, file.version) == file.version


def _pause(error: Exception) -> float:
    """Return the number of seconds before another attempt: what the server asks for, but at most `MAX_PAUSE`."""
    requested = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
    return min(float(requested), MAX_PAUSE) if requested.isdecimal() else PAUSE


def _headers(file: RemoteFile, position: int) -> dict[str, str]:
    """Return the headers of a request for a file from a position on."""
    headers = {"Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
        if file.version and not file.version.startswith("W/"):
            headers["If-Range"] = file.version
    return headers


def _unreachable(url: str, error: BaseException) -> DerainError:
    status = getattr(error, "status", None)
    if status is not None:
        reason = f"HTTP {status}"
    elif isinstance(error, FileNotFoundError):
        reason = "HTTP 404"
    else:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    advice = "open it in a browser: it may need a login" if status in (401, 403) else "try again later"
    return DerainError(
        f"{url}: cannot be fetched ({reason}); {advice}, or use another source (--from, --archive); what has arrived "
        "is kept"
    )
