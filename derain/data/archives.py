"""Unpack zip and tar archives, without writing outside the target folder."""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from derain.errors import DerainError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Endings of the names of archives that can be unpacked."""

MACOS_FOLDER = "__MACOSX"
"""Folder with metadata that macOS adds to archives; it is not unpacked."""

FOLDER_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that operating systems add to folders; they are not unpacked, and neither are the ``._*`` files of macOS."""

OTHER_FORMATS = {b"Rar!\x1a\x07": "RAR", b"7z\xbc\xaf\x27\x1c": "7z"}
"""First bytes of archives that derain cannot unpack, and the names of their formats."""

DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
"""Exceptions that reading a damaged archive, or one with unknown compression, can raise."""

BLOCK = 2**20
"""Number of bytes that are written at a time."""


class DamagedArchiveError(DerainError):
    """A file is an incomplete or damaged archive, or no archive at all.

    Args:
        archive: The file.
        reason: What is wrong with it.
    """

    def __init__(self, archive: Path, reason: str) -> None:
        super().__init__(f"{archive}: {reason}; download it again")
        self.archive = archive
        self.reason = reason


@dataclass(frozen=True)
class Member:
    """File in an archive.

    Attributes:
        path: Relative path with ``/``, without ``..``.
        size: Size in bytes when unpacked.
    """

    path: str
    size: int


def is_archive(name: str) -> bool:
    """Return whether a file name ends like that of an archive.

    Example:
        >>> is_archive("Rain100L.ZIP"), is_archive("1.png")
        (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def list_members(archive: Path) -> list[Member]:
    """Return the files of an archive.

    Metadata of operating systems is omitted.

    Raises:
        DamagedArchiveError: If the file is not an archive, or is damaged.
        DerainError: If the file does not exist, or the archive is a RAR or 7z archive, is encrypted, or contains links,
            devices, absolute paths or paths with ``..``.
        OSError: If the file cannot be read.
    """
    if not archive.is_file():
        raise DerainError(f"{archive}: no such file; give a zip or tar archive")
    with _archive_errors(archive):
        _check_format(archive)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return [Member(path, info.file_size) for path, info in _zip_files(archive, opened)]
        with tarfile.open(archive) as opened_tar:
            return [Member(path, info.size) for path, info in _tar_files(archive, opened_tar)]


def unpack(archive: Path, folder: Path, advance: Callable[[int], None]) -> None:
    """Unpack the files of an archive.

    Args:
        archive: The archive.
        folder: Target folder.
        advance: Called with the number of bytes of each block that is written.

    Raises:
        DamagedArchiveError: As `list_members`.
        DerainError: If `list_members` refuses the format or a member, or a file exists already.
        OSError: If the archive does not exist, or a file cannot be read or written.
    """
    with _archive_errors(archive):
        _check_format(archive)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for path, info in _zip_files(archive, opened):
                    with opened.open(info) as source:
                        _write(archive, source, folder / path, advance)
            return
        with tarfile.open(archive) as opened_tar:
            for path, tar_info in _tar_files(archive, opened_tar):
                content = opened_tar.extractfile(tar_info)
                assert content is not None  # regular files have contents
                with content:
                    _write(archive, content, folder / path, advance)


def _check_format(archive: Path) -> None:
    with archive.open("rb") as file:
        start = file.read(8)
    for signature, name in OTHER_FORMATS.items():
        if start.startswith(signature):
            raise DerainError(
                f"{archive}: a {name} archive, expected zip or tar; unpack it yourself into a folder named like the set"
            )


def _zip_files(archive: Path, opened: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    for info in opened.infolist():
        if info.is_dir():
            continue
        if info.flag_bits & 1:
            raise DerainError(f"{archive}: {info.filename} is encrypted; unpack it yourself")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _unsafe(archive, info.filename, "is a link")
        path = _safe_path(archive, info.filename)
        if path:
            yield path, info


def _tar_files(archive: Path, opened: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    for info in opened:
        if info.isdir():
            continue
        if not info.isfile():
            raise _unsafe(archive, info.name, "is a link or device")
        path = _safe_path(archive, info.name)
        if path:
            yield path, info


def _safe_path(archive: Path, name: str) -> str:
    """Return the path of a member with ``/``; empty for metadata of operating systems.

    Raises:
        DerainError: If the path is absolute, empty or contains ``..``.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or not path.parts:
        raise _unsafe(archive, name, "is not a path inside a folder")
    is_metadata = path.parts[0] == MACOS_FOLDER or path.name in FOLDER_FILES or path.name.startswith("._")
    return "" if is_metadata else str(path)


def _unsafe(archive: Path, name: str, problem: str) -> DerainError:
    return DerainError(
        f"{archive}: {name!r} {problem}; expected only files with relative paths without '..'; use another archive, or "
        "unpack it yourself"
    )


def _write(archive: Path, source: Any, target: Path, advance: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        output = target.open("xb")
    except FileExistsError as error:
        raise DerainError(
            f"{archive}: {target.name} exists already in {target.parent.name}, from this or another archive; unpack "
            "the archives yourself"
        ) from error
    with output:
        while block := source.read(BLOCK):
            output.write(block)
            advance(len(block))


@contextmanager
def _archive_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.ReadError as error:
        reason = f"damaged, or neither zip nor tar ({error}); unpack other formats yourself"
        raise DamagedArchiveError(archive, reason) from error
    except DAMAGED as error:
        raise DamagedArchiveError(archive, f"damaged ({error})") from error
    except OSError as error:
        if error.errno is not None:  # a full disk, a missing file
            raise
        raise DamagedArchiveError(archive, f"damaged ({error})") from error


def free_bytes(folder: Path) -> int:
    """Return the free disk space in bytes at a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free
