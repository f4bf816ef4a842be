"""Temporary files of outputs: their names, their locks, and the removal of those that killed commands left."""

import logging
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that is open
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("derain")

UNFINISHED = re.compile(r"\.[0-9a-f]{8}-.+")
"""Pattern of names of temporary files: ``.``, 8 random hexadecimal digits, ``-``, and the end of the output's name."""


def temporary_path(path: Path) -> Path:
    """Return a new path for a temporary file in the folder of a file."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}{_ending(path)}")


def _ending(path: Path) -> str:
    return f"-{path.name[-50:]}"  # names have at most 255 bytes


@contextmanager
def locked(temporary: Path) -> Iterator[None]:
    """Create a temporary file, and lock it until the block or the process ends; on Windows, do nothing."""
    if fcntl is None:
        yield
        return
    with temporary.open("ab") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def remove_unfinished_outputs(outputs: Iterable[Path]) -> None:
    """Remove the temporary files that killed commands left beside their outputs, and report them.

    Files that another command is writing are kept.
    """
    endings: dict[Path, set[str]] = defaultdict(set)
    for path in outputs:
        endings[path.parent].add(_ending(path))
    for folder, expected in endings.items():
        for path in folder.glob(".*-*"):
            if UNFINISHED.fullmatch(path.name) and path.name[9:] in expected:
                _remove(path)


def _remove(path: Path) -> None:
    try:
        size = path.stat().st_size
        if fcntl is not None:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except FileNotFoundError:  # finished, or removed by another command
        return
    except OSError as error:
        reason = "another command is writing it" if isinstance(error, BlockingIOError | PermissionError) else error
        log.warning("%s: kept an unfinished output of another command (%s)", path, reason)
        return
    log.warning("%s: removed, %.1f MB of an output that an earlier command left unfinished", path, size / 1e6)
