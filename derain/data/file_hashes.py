"""Cache of content hashes of files, and of results computed from files.

A hash is valid until size, inode or times of its file change. A result of `cached_numbers` depends on contents alone,
one of `save_computed` on everything that its key contains, such as the paths, sizes and times of files.
"""

import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from derain.data.shards import ShardImage
from derain.folders import cache_folder
from derain.image_sources import ImageFile
from derain.images import write_whole
from derain.progress import track

SETTLED_AGE = 2_000_000_000
"""A file's times are trusted once its last change is older than this, in nanoseconds.

A coarse clock may give two changes in quick succession the same time.
"""

UNREADABLE_CACHE = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions that reading a missing or damaged cache file can raise."""

log = logging.getLogger("derain")
Entry = tuple[list[int], bytes]
"""Size, inode and times of a file when it was hashed, and its SHA-256."""


def file_hashes(files: Sequence[ImageFile]) -> list[bytes]:
    """Return the SHA-256 of each file's content, 32 bytes, from the cache if size, inode and times are unchanged.

    The cache has one JSON file per folder of images, in ``cache_folder()/digests``. Images in shards have their hash in
    the index.

    Raises:
        FileNotFoundError: If a file does not exist.
    """
    files_by_folder: dict[Path, list[Path]] = defaultdict(list)
    hashes: dict[ImageFile, bytes] = {}
    for file in dict.fromkeys(files):
        if isinstance(file, ShardImage):
            hashes[file] = file.sha256
        else:
            assert isinstance(file, Path)
            files_by_folder[file.parent].append(file)
    entries = {folder: _load(_cache_file(folder)) for folder in files_by_folder}
    changed = []
    for folder, folder_files in files_by_folder.items():
        for file in folder_files:
            entry = entries[folder].get(file.name)
            if entry is not None and entry[0] == _state(file.stat()):
                hashes[file] = entry[1]
            else:
                changed.append(file)
    if not changed:
        return [hashes[file] for file in files]
    size = sum(file.stat().st_size for file in changed)
    log.info("fingerprint: reading %d new or changed files, %.2f GB", len(changed), size / 1e9)
    with ThreadPoolExecutor() as threads:
        results = track(threads.map(_hash, changed), "Hashing", len(changed))
        for file, (state, digest) in zip(changed, results, strict=True):
            hashes[file] = digest
            if state is not None:
                entries[file.parent][file.name] = (state, digest)
    for folder in {file.parent for file in changed}:
        content = {name: (state, digest.hex()) for name, (state, digest) in entries[folder].items()}
        _save(_cache_file(folder), content)
    return [hashes[file] for file in files]


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
    """Return the JSON content that `save_computed` saved under a key; None if there is none."""
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
            state = _state((root / file).stat())
        except OSError:  # a broken link
            state = []
        digest.update(os.fsencode(f"{file}\0{state}\0"))
    return digest.digest()


def _computed_file(*key: bytes) -> Path:
    name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    return cache_folder() / "computed" / f"{name}.json"


def _hash(file: Path) -> tuple[list[int] | None, bytes]:
    """Return state and hash of a file; None as state if it changed too recently to trust its times."""
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").digest()
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_AGE
    return _state(status) if settled else None, digest


def _state(status: os.stat_result) -> list[int]:
    """Return size, inode and times; they change with the content, since programs cannot set the last one (ctime)."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _cache_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return cache_folder() / "digests" / f"{name}.json"


def _load(path: Path) -> dict[str, Entry]:
    """Return the entries of a cache file; none if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
        entries = {name: (list(map(int, state)), bytes.fromhex(digest)) for name, (state, digest) in content.items()}
    except UNREADABLE_CACHE:
        return {}
    complete = all(len(digest) == hashlib.sha256().digest_size for _, digest in entries.values())
    return entries if complete else {}


def _save(path: Path, content: object) -> None:
    """Write a cache file; warn if that fails, since the next run then computes its content again."""
    try:
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps(content))
    except OSError as error:
        log.warning("%s: cannot write the cache (%s); the next run reads the images again", path, error)
