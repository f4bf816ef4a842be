"""Files of the page of ``derain app``: who may use them, limits on uploads, deletion."""

import os
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

KEEP_MINUTES = 30
"""Minutes without a change after which uploads and results are deleted."""


class PageFiles:
    """Uploads and restored photos in one folder.

    Args:
        folder: Folder with all files of the page, without symbolic links in its path.
        client_bytes: Maximum number of bytes that one address may upload in ``KEEP_MINUTES`` minutes.
    """

    def __init__(self, folder: Path, client_bytes: int) -> None:
        self.folder = folder
        self.client_bytes = client_bytes
        self._owners: dict[str, set[str]] = {}
        """Cookies of the browsers that may use a file, by path."""
        self._uploaded = Counter[tuple[str, int]]()
        """Bytes by address and minute."""

    def add(self, paths: Iterable[str], cookie: str) -> None:
        """Allow the browser with a cookie to use files; paths outside the folder are ignored."""
        for path in paths:
            if self._is_inside(path):
                self._owners.setdefault(path, set()).add(cookie)

    def belongs(self, path: object, cookie: str) -> bool:
        """Return whether `add` has allowed the browser with a cookie to use a file."""
        return isinstance(path, str) and cookie in self._owners.get(path, ()) and self._is_inside(path)

    def count(self, address: str, size: int) -> bool:
        """Count bytes that an address uploads; return False if its recent uploads exceed ``client_bytes`` in all.

        Args:
            address: IP address of the client.
            size: Number of new bytes.
        """
        minute = _minute()
        self._uploaded[address, minute] += size
        total = sum(self._uploaded[address, minute - age] for age in range(KEEP_MINUTES + 1))
        return total <= self.client_bytes

    def delete_old(self) -> None:
        """Delete files that have not changed for ``KEEP_MINUTES`` minutes; forget their owners and old upload sizes."""
        for path in self.folder.rglob("*"):
            try:
                if not path.is_dir() and time.time() - path.lstat().st_ctime > KEEP_MINUTES * 60:
                    path.unlink()
            except OSError:  # deleted already, or open on Windows: the next call tries again
                continue
        self._owners = {path: owners for path, owners in self._owners.items() if Path(path).exists()}
        oldest = _minute() - KEEP_MINUTES
        self._uploaded = Counter({key: size for key, size in self._uploaded.items() if key[1] >= oldest})

    def _is_inside(self, path: str) -> bool:
        try:
            return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # a path that is too long or contains NUL
            return False


def touch(files: Iterable[Path]) -> None:
    """Postpone the deletion of files, which depends on when they last changed; missing files are ignored."""
    for file in files:
        with suppress(FileNotFoundError):
            os.utime(file)


def _minute() -> int:
    return int(time.monotonic() // 60)
