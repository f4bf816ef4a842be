"""Read image pairs from shards: tar files in the format of WebDataset, on a disk or behind a URL.

A folder of shards has an index per split, ``SPLIT-index.json.gz``, with the position, size and SHA-256 of each image
in ``SPLIT-000000.tar``, ``SPLIT-000001.tar``, …. Any image can be read by its position. So shuffling, distribution
over ranks and resuming are the same as with image files.
"""

import errno
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from derain.data.layouts import LAYOUTS, Files, Split
from derain.data.name_matching import PairedFiles
from derain.errors import DerainError
from derain.image_sources import ImageFile, first_line

FORMAT = "derain shards"
"""Name of the format, in the first line of an index."""

VERSION = 1
"""Version of the index; increment when earlier versions of derain could misread it."""

MAX_OPEN = 64
"""Maximum number of shards that a process keeps open, since systems limit the number of open files."""

PAUSES = (1, 2, 4, 8)
"""Seconds before each new attempt to read from a URL."""

IndexEntry = tuple[int, int, int, str, str]
"""Entry of an image in an index: number of the shard, offset, length, SHA-256, and path in the data set."""

log = logging.getLogger("derain")


@dataclass(frozen=True, slots=True)
class ShardImage:
    """Image file in a shard.

    Images are equal if location, name and SHA-256 are equal, since a shard repeats a clean image for each of its rainy
    images.

    Attributes:
        location: Folder or URL of the shards.
        name: Path of the file in the data set from which the shards were written, with ``/``.
        sha256: SHA-256 of the file, 32 bytes.
        shard: Name of the shard.
        offset: Position of the file in the shard in bytes.
        length: Size of the file in bytes.
        height: Height of the upright rainy file of the pair in pixels.
        width: Width of the upright rainy file of the pair in pixels.
        checked: Whether this process has compared the file on the disk with its SHA-256, so that later reads need not.
            Files behind a URL are compared whenever they are read; for them, it stays false.
    """

    location: str
    name: str
    sha256: bytes
    shard: str = field(compare=False)
    offset: int = field(compare=False)
    length: int = field(compare=False)
    height: int = field(compare=False)
    width: int = field(compare=False)
    checked: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        """Return shard and name, for messages."""
        return f"{_join(self.location, self.shard)}: {self.name}"

    @property
    def stem(self) -> str:
        """Name of the file without folders and suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> tuple[str, str]:
        """Folder of the file: location of the shards, and path in the data set."""
        return self.location, self.name.rpartition("/")[0]

    def open(self, mode: Literal["rb"] = "rb") -> io.BytesIO:
        """Read the file, and return it as an open file in memory.

        Raises:
            DerainError: If the shard cannot be read, is truncated, or differs from the index.
        """
        try:
            content = _read(_join(self.location, self.shard), self.offset, self.length)
        except DerainError as error:
            raise DerainError(f"{error} (reading {self.name})") from error
        if len(content) > self.length:
            raise DerainError(
                f"{self}: got {len(content)} bytes instead of {self.length}; the server must support ranges of bytes"
            )
        if len(content) < self.length:
            raise DerainError(
                f"{self}: ends after {len(content)} of {self.length} bytes; the shard is truncated; copy it again"
            )
        if not self.checked and hashlib.sha256(content).digest() != self.sha256:
            raise DerainError(
                f"{self}: its SHA-256 differs from the index; the shard is damaged or belongs to another index; copy "
                "both again"
            )
        if not self.checked and not is_url(self.location):
            object.__setattr__(self, "checked", True)  # the only change of an otherwise frozen object
        return io.BytesIO(content)


@dataclass(frozen=True)
class ShardedSplit:
    """One split of a data set in shards.

    Attributes:
        name: Name of the data set from which the shards were written.
        layout: Layout of the data set.
        files: Pairs of the split; the files are of type `ShardImage`.
        note: Note for the user: numbers of pairs and shards, size and location.
    """

    name: str
    layout: str
    files: PairedFiles
    note: str


def is_url(location: str) -> bool:
    """Return whether a location is a URL, such as ``s3://bucket/set``."""
    return "://" in location


def is_remote(image: ImageFile) -> bool:
    """Return whether an image is in a shard behind a URL."""
    return isinstance(image, ShardImage) and is_url(image.location)


def index_name(split: str) -> str:
    """Return the file name of the index of a split."""
    return f"{split}-index.json.gz"


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:06d}.tar"


def sharded_splits(folder: Path) -> list[Split]:
    """Return the splits of which a folder contains an index of shards; empty for other folders."""
    return [split for split in get_args(Split) if (folder / index_name(split)).is_file()]


def read_split(location: str, split: Split) -> ShardedSplit:
    """Read the index of a split; shards on a disk are checked for their size.

    Args:
        location: Folder or URL of the shards.
        split: Split to read. For ``predict`` without an index, the rainy images of ``test`` are returned.

    Raises:
        DerainError: If there is no such split; if the index cannot be read, is damaged, or has another version or an
            unknown layout; or if a shard is missing or has another size.
    """
    address = _join(location, index_name(split))
    _opened.cache_clear()  # shards may have been written again under the same names
    try:
        content = _read(address)
    except _MissingFileError as error:
        if split == "predict":
            return _without_clean(read_split(location, "test"))
        found = [] if is_url(location) else sharded_splits(Path(location))
        available = f"has only {' and '.join(found)}" if found else "has no such file"
        raise DerainError(
            f"{address}: {location} {available}; write shards of this split: derain data shard SET OUT --split {split}"
        ) from error
    try:
        lines = iter(gzip.decompress(content).decode().splitlines())
        header = json.loads(next(lines))
        _check_version(header, address)
        files = PairedFiles(
            tuple(_pairs(lines, location, split)),
            variant=Files("", clean_side=header["clean_side"], video=header["video"]),
        )
        count, sizes = int(header["pairs"]), list(map(int, header["shard_sizes"]))
        if len(files.pairs) != count:
            raise DerainError(f"{address}: has {len(files.pairs)} pairs instead of {count}; copy it again")
        if not is_url(location):
            _check_sizes(Path(location), split, sizes)
        note = (
            f"{count} pairs of {header['name']} {split} in {len(sizes)} shards, {sum(sizes) / 1e6:,.1f} MB, {location}"
        )
        return ShardedSplit(header["name"], header["layout"], files, note)
    except DerainError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        reason = first_line(error) or type(error).__name__
        raise DerainError(f"{address}: damaged index ({reason}); copy it again") from error


def index_line(name: str, size: tuple[int, int], entries: Sequence[IndexEntry]) -> str:
    """Return a line of an index.

    Args:
        name: Name of the pair.
        size: Height and width of the rainy file in pixels.
        entries: Entries of the rainy and the clean image, or of the rainy one only.
    """
    return json.dumps([name, *size, *entries])


def _pairs(lines: Iterator[str], location: str, split: str) -> Iterator[tuple[str, ShardImage, ShardImage | None]]:
    shard = functools.cache(lambda number: shard_name(split, number))  # all images of a shard share one string
    for line in lines:
        name, height, width, *entries = json.loads(line)
        images = [
            ShardImage(location, file, bytes.fromhex(sha256), shard(number), offset, length, height, width)
            for number, offset, length, sha256, file in entries
        ]
        yield name, images[0], images[1] if len(images) > 1 else None


def _check_version(header: Mapping[str, Any], address: str) -> None:
    if header.get("format") != FORMAT:
        raise DerainError(f"{address}: not an index of derain; expected one written by derain data shard")
    if header["version"] != VERSION:
        raise DerainError(
            f"{address}: version {header['version']} of the index; this derain reads version {VERSION}; update derain, "
            "or write the shards again"
        )
    if header["layout"] not in LAYOUTS:
        raise DerainError(f"{address}: layout {header['layout']} is not known to this version of derain; update derain")


def _check_sizes(folder: Path, split: str, sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        shard = folder / shard_name(split, number)
        if not shard.is_file():
            raise DerainError(f"{shard}: no such shard; the index lists {len(sizes)} shards; copy all of them")
        if shard.stat().st_size != size:
            raise DerainError(f"{shard}: has {shard.stat().st_size} bytes; expected {size}; copy the shard again")


def _without_clean(split: ShardedSplit) -> ShardedSplit:
    files = split.files
    pairs = tuple((name, rainy, None) for name, rainy, _ in files.pairs)
    return ShardedSplit(split.name, split.layout, PairedFiles(pairs, variant=files.variant), split.note)


# Files on a disk or behind a URL.


class _MissingFileError(DerainError):
    """The file does not exist."""


def _join(location: str, name: str) -> str:
    return f"{location.rstrip('/')}/{name}"


def _read(address: str, offset: int = 0, length: int | None = None) -> bytes:
    """Return the bytes of a file from an offset, at most ``length`` unless a server ignores the range.

    Args:
        address: Path or URL of the file.
        offset: Index of the first byte.
        length: Number of bytes; None for all bytes up to the end.

    Raises:
        _MissingFileError: If there is no such file.
        DerainError: If the file cannot be read.
    """
    if is_url(address):
        return _download(address, offset, length)
    try:
        if length is not None and hasattr(os, "pread"):
            return _opened(address).read(offset, length)
        with Path(address).open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except FileNotFoundError as error:
        raise _MissingFileError(f"{address}: no such file; copy all files of the set") from error
    except OSError as error:
        raise DerainError(f"{address}: cannot be read ({error.strerror}); check the disk") from error


class _OpenShard:
    """Shard on a disk that stays open until it is garbage-collected, so that it is not opened for each image.

    `os.pread` leaves the position of the file unchanged, so that threads and forked processes can share the open file.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Return at most ``length`` bytes from an offset, fewer at the end of the file only."""
        content = os.pread(self._descriptor, length, offset)
        while len(content) < length:
            following = os.pread(self._descriptor, length - len(content), offset + len(content))
            if not following:
                break
            content += following
        return content


_opened = functools.lru_cache(MAX_OPEN)(_OpenShard)


def _download(url: str, offset: int, length: int | None) -> bytes:
    """Return bytes of a file behind a URL, as `_read` does; try again after errors that may be temporary."""
    import fsspec

    try:
        # Not stored: processes that are forked later must not use this file system. fsspec caches one per process.
        files, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise DerainError(f"{url}: {first_line(error)}; for s3://, run: pip install 'derain[s3]'") from error
    except ValueError as error:
        raise DerainError(f"{url}: {first_line(error)}; use s3://, hf://, https:// or a folder") from error
    options: dict[str, Any] = {} if length is None else {"start": offset, "end": offset + length}
    if not files.async_impl:
        options["cache_type"] = "none"  # otherwise, the hub's file system reads several megabytes ahead
    attempt = 0
    while True:
        try:
            return bytes(files.cat_file(path, **options))
        except FileNotFoundError as error:
            raise _MissingFileError(f"{url}: no such file; check the URL, and upload all files of the set") from error
        except _read_errors() as error:
            reason = first_line(error) or type(error).__name__
            if attempt == len(PAUSES) or _is_permanent(error):
                count = f" in {attempt + 1} attempts" if attempt else ""
                raise DerainError(
                    f"{url}: cannot be read{count} ({reason}); check the network and your access"
                ) from error
            log.warning("%s: %s; trying again in %d s", url, reason, PAUSES[attempt])
            time.sleep(PAUSES[attempt])
            attempt += 1


def _read_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of failed reads; those of libraries that are not loaded cannot occur."""
    errors: list[type[Exception]] = [OSError, TimeoutError]
    for module, name in (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _is_permanent(error: Exception) -> bool:
    """Return whether another attempt would fail too: access denied, or a request that the server refuses.

    For a range beyond the end of a file, s3fs raises EINVAL.
    """
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None) or 0
    refused = 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, PermissionError) or refused or getattr(error, "errno", None) == errno.EINVAL
