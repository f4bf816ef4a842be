"""Content hashes of files, and what depends on contents alone, computed once: remembered until a file changes."""

import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from derain.folders import cache_folder
from derain.images import write_whole
from derain.progress import track

SETTLED = 2_000_000_000
"""Nanoseconds after which a file's times are trusted: a later change gets other times even on coarse clocks."""

DAMAGE = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a cache file that is absent or damaged can raise."""

log = logging.getLogger("derain")
Entry = tuple[list[int], bytes]
"""Size, inode and times of a file when it was hashed, and its SHA-256."""


def file_hashes(files: Sequence[Path]) -> list[bytes]:
    """Return the SHA-256 of each file's content, from the cache where size, inode and times are unchanged.

    The cache has one JSON file for each folder of images, in ``cache_folder()/digests``.

    Raises:
        FileNotFoundError: If a file is absent.
    """
    folders: dict[Path, list[Path]] = defaultdict(list)
    for file in dict.fromkeys(files):
        folders[file.parent].append(file)
    known: dict[Path, dict[str, Entry]] = {folder: _load(_cache_file(folder)) for folder in folders}
    found: dict[Path, bytes] = {}
    new = []
    for folder, members in folders.items():
        for file in members:
            entry = known[folder].get(file.name)
            if entry is not None and entry[0] == _state(file.stat()):
                found[file] = entry[1]
            else:
                new.append(file)
    if not new:
        return [found[file] for file in files]
    size = sum(file.stat().st_size for file in new)
    log.info("fingerprint: reading %d new or changed files, %.2f GB", len(new), size / 1e9)
    with ThreadPoolExecutor() as threads:
        for file, (state, digest) in zip(new, track(threads.map(_digest, new), "Hashing", len(new)), strict=True):
            found[file] = digest
            if state is not None:
                known[file.parent][file.name] = (state, digest)
    for folder in {file.parent for file in new}:
        entries = {name: (state, digest.hex()) for name, (state, digest) in known[folder].items()}
        _save(_cache_file(folder), entries)
    return [found[file] for file in files]


def cached_numbers(what: str, files: Sequence[Path], compute: Callable[[], list[int]]) -> list[int]:
    """Return numbers that depend on the contents of files alone, from the cache if they were computed before.

    Args:
        what: Names the computation, its version and its options.
        files: What it depends on, in order.
        compute: Computes them.

    Raises:
        FileNotFoundError: If a file is absent.
    """
    key = hashlib.sha256(b"\0".join([what.encode(), *file_hashes(files)])).hexdigest()[:16]
    path = cache_folder() / "computed" / f"{key}.json"
    try:
        return list(map(int, json.loads(path.read_bytes())))
    except DAMAGE:
        numbers = compute()
    _save(path, numbers)
    return numbers


def _digest(file: Path) -> tuple[list[int] | None, bytes]:
    """Hash a file; its state is None if it changed so recently that a further change might not show."""
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").digest()
    settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED
    return _state(status) if settled else None, digest


def _state(status: os.stat_result) -> list[int]:
    """What changes with a file's content: the time of its last status change cannot be set by programs."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _cache_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return cache_folder() / "digests" / f"{name}.json"


def _load(path: Path) -> dict[str, Entry]:
    """Read a cache file; one that is absent or damaged counts as empty."""
    try:
        content = json.loads(path.read_bytes())
        entries = {name: (list(map(int, state)), bytes.fromhex(digest)) for name, (state, digest) in content.items()}
    except DAMAGE:
        return {}
    whole = all(len(digest) == hashlib.sha256().digest_size for _, digest in entries.values())
    return entries if whole else {}


def _save(path: Path, content: object) -> None:
    """Write a cache file; without it the next start reads the images again."""
    try:
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps(content))
    except OSError as error:
        log.warning("%s: cannot remember what images hold: %s", path, error)
