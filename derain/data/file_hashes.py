"""Cache of content hashes of files, and of results computed from files.

A hash is valid until the size, inode or times of its file change. A result of `cached_numbers` is valid until the
contents of its files change, and content saved by `save_computed` until its key changes.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from derain.data.shards import ShardImage
from derain.folders import cache_folder
from derain.image_sources import ImageFile
from derain.images import write_whole
from derain.progress import track
from derain.threads import map_in_threads

SETTLED_AGE = 2_000_000_000
"""A file's times are trusted once its last change is older than this, in nanoseconds.

A coarse clock may give two changes in quick succession the same time.
"""

DIGEST_BYTES = 32
"""Size of a SHA-256 hash."""

UNREADABLE_CACHE = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions that reading a missing or damaged cache file can raise."""

log = logging.getLogger("derain")


def file_hashes(files: Sequence[ImageFile]) -> list[bytes]:
    """Return the SHA-256 of each file's content, 32 bytes, from the cache if size, inode and times are unchanged.

    The cache in ``cache_folder()/digests`` has one JSON file per folder of images. For each file name, it contains the
    size, inode and times when the file was hashed, and the hash in hexadecimal digits. The hashes of images in shards
    are in the index of the shards.

    Raises:
        FileNotFoundError: If a file does not exist.
    """
    hashes = _path_hashes(dict.fromkeys(str(file) for file in files if isinstance(file, Path)))
    return [file.sha256 if isinstance(file, ShardImage) else hashes[str(file)] for file in files]


def _path_hashes(paths: Iterable[str]) -> dict[str, bytes]:
    """Return the SHA-256 of each file by its path; add new hashes to the cache."""
    entries: dict[str, dict[str, Any]] = {}
    hashes: dict[str, bytes] = {}
    changed = []
    for path in paths:
        folder, name = _split(path)
        if folder not in entries:
            entries[folder] = _load(_cache_file(folder))
        digest = _valid_digest(entries[folder].get(name), _state_of(path))
        if digest is None:
            changed.append(Path(path))
        else:
            hashes[path] = digest
    if not changed:
        return hashes
    size = sum(file.stat().st_size for file in changed)
    log.info("fingerprint: reading %d new or changed files, %.2f GB", len(changed), size / 1e9)
    results = track(map_in_threads(_hash, changed), "Hashing", len(changed))
    for file, (state, digest) in zip(changed, results, strict=True):
        hashes[str(file)] = digest
        if state is not None:
            folder, name = _split(str(file))
            entries[folder][name] = [state, digest.hex()]
    for folder in {_split(str(file))[0] for file in changed}:
        _save(_cache_file(folder), entries[folder])
    return hashes


def cached_numbers(computation: str, files: Sequence[ImageFile], compute: Callable[[], list[int]]) -> list[int]:
    """Return integers that depend on the contents of files alone, from the cache if they were computed before.

    Args:
        computation: Name of the computation, with its version and options.
        files: Files that the result depends on, in order.
        compute: Called if the cache has no result.

    Raises:
        FileNotFoundError: If a file does not exist.
    """
    path = _computed_file(computation.encode(), *file_hashes(files))
    try:
        return list(map(int, json.loads(path.read_bytes())))
    except UNREADABLE_CACHE:
        numbers = compute()
    _save(path, numbers)
    return numbers


def load_computed(key: Sequence[bytes]) -> Any:
    """Return the JSON content that `save_computed` saved under a key; None if there is none, or it is damaged."""
    try:
        return json.loads(_computed_file(*key).read_bytes())
    except UNREADABLE_CACHE:
        return None


def save_computed(key: Sequence[bytes], content: object) -> None:
    """Save JSON content under a key, which must contain everything that the content depends on."""
    _save(_computed_file(*key), content)


def states_digest(root: Path, files: Sequence[str]) -> bytes:
    """Return a hash of names, sizes, inodes and times of files; it changes if a file is added, removed or changed.

    Args:
        root: A folder.
        files: Paths of the files, relative to it.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            state = _state_of(f"{root}/{file}")
        except OSError:  # a broken link
            state = []
        digest.update(os.fsencode(f"{file}\0{state}\0"))
    return digest.digest()


def _computed_file(*key: bytes) -> Path:
    name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    return cache_folder() / "computed" / f"{name}.json"


def _hash(file: Path) -> tuple[list[int] | None, bytes]:
    """Return the state of a file (see `_state`) and its hash; None as state if its times are too recent to trust."""
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").digest()
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_AGE
    return _state(status) if settled else None, digest


def _state_of(path: str) -> list[int]:
    """Return size, inode and times of a file."""
    return _state(os.stat(path))  # noqa: PTH116 - Path takes several times as long


def _state(status: os.stat_result) -> list[int]:
    """Return size, inode, mtime and ctime; programs that change a file cannot set its ctime."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _split(path: str) -> tuple[str, str]:
    """Return the folder of a file, which ends in a separator or is empty, and its name; ``os.path.split`` is slower."""
    head, separator, name = path.rpartition(os.sep)
    return head + separator, name


def _cache_file(folder: str) -> Path:
    name = hashlib.sha256(os.fsencode(Path(folder).absolute())).hexdigest()[:16]
    return cache_folder() / "digests" / f"{name}.json"


def _load(path: Path) -> dict[str, Any]:
    """Return the entries of a cache file; none if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except UNREADABLE_CACHE:
        return {}
    return content if isinstance(content, dict) else {}


def _valid_digest(entry: Any, current_state: list[int]) -> bytes | None:
    """Return the hash of an entry; None if the file has changed since, or the entry is missing or damaged."""
    try:
        state, digest = entry
        content_hash = bytes.fromhex(digest)
    except UNREADABLE_CACHE:
        return None
    return content_hash if state == current_state and len(content_hash) == DIGEST_BYTES else None


def _save(path: Path, content: object) -> None:
    """Write a cache file; warn if that fails, since the next run then computes its content again."""
    try:
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps(content))
    except OSError as error:
        log.warning("%s: cannot write the cache (%s); the next run computes its content again", path, error)
