"""Files that a server offers, their sizes and checksums, and the check of downloaded files against these."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derain.errors import DerainError
from derain.progress import track


@dataclass(frozen=True)
class RemoteFile:
    """File on a server.

    Attributes:
        path: Path in the repository, with ``/``, or name of the archive; also the path in the download folder.
        size: Size in bytes; None if the server does not state it.
        sha256: SHA-256 in hexadecimal digits; empty if unknown.
        blob_id: Git's SHA-1 of the file in hexadecimal digits; empty if unknown or not needed beside ``sha256``.
        url: Address; empty for files of the hub.
        version: The web server's identifier of this version of the file: ETag or date; empty if there is none.
    """

    path: str
    size: int | None
    sha256: str = ""
    blob_id: str = ""
    url: str = ""
    version: str = ""

    @property
    def has_checksum(self) -> bool:
        """Whether the contents of a downloaded file can be checked, and not only its size."""
        return bool(self.sha256 or self.blob_id)


@dataclass(frozen=True)
class Listing:
    """Files of a source, as its server lists them.

    Attributes:
        address: Page of the repository; for web servers, the addresses of the files, separated by spaces.
        files: The files.
        licence: Licence that the server states; empty if it states none.
        commit: Commit of a repository, 40 hexadecimal digits; empty for web servers.
    """

    address: str
    files: tuple[RemoteFile, ...]
    licence: str = ""
    commit: str = ""

    @property
    def size(self) -> int:
        """Total size in bytes of the files whose sizes are known."""
        return sum(file.size or 0 for file in self.files)


def downloaded_bytes(files: Sequence[RemoteFile], folder: Path) -> int:
    """Return how many bytes of the files are in a download folder, including those of partial files."""
    total = 0
    for file in files:
        target = folder / file.path
        for local_file in (target, partial_path(target)):
            if local_file.is_file():
                total += local_file.stat().st_size
    return total


def partial_path(target: Path) -> Path:
    """Return the path under which a file is saved until it is complete."""
    return target.with_name(f"{target.name}.partial")


def check_downloads(files: Sequence[RemoteFile], folder: Path) -> None:
    """Check downloaded files against their known sizes and checksums; delete those that differ.

    Args:
        files: The files, with the expected sizes and checksums.
        folder: Download folder.

    Raises:
        DerainError: If a file is missing, or its size or checksum differs.
    """
    with ThreadPoolExecutor() as threads:
        results = track(threads.map(lambda file: _problem(file, folder / file.path), files), "Checking", len(files))
        problems = [problem for problem in results if problem]
    if problems:
        raise DerainError(
            f"{len(problems)} of {len(files)} files are damaged or missing: {problems[0]}; damaged files were deleted; "
            "run the same command to fetch them again"
        )


def _problem(file: RemoteFile, target: Path) -> str:
    """Return what is wrong with a downloaded file, or empty text; delete a file of wrong size or checksum."""
    if not target.is_file():
        return f"{file.path} is missing"
    size = target.stat().st_size
    if file.size is not None and size != file.size:
        target.unlink()
        return f"{file.path} has {size} bytes, expected {file.size}"
    if file.sha256:
        name, digest, expected = "SHA-256", hashlib.sha256(), file.sha256
    elif file.blob_id:
        name, digest, expected = "Git's SHA-1", hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file.blob_id
    else:
        return ""
    found = _hash(target, digest)
    if found == expected.lower():
        return ""
    target.unlink()
    return f"{file.path} has {name} {found}, expected {expected}"


def _hash(target: Path, digest: Any) -> str:
    with target.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return str(digest.hexdigest())
