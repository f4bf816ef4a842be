"""Files of the page of ``derain app``: which sessions may use them, how much a client sends, when they are deleted."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

KEPT = 30
"""Minutes after which an upload and its results are deleted, unless the page ends earlier."""


class PageFiles:
    """Uploads and restored photos in one folder.

    Args:
        folder: Folder with all files of the page.
        client_bytes: Largest size of all uploads from one address in ``KEPT`` minutes.
    """

    def __init__(self, folder: Path, client_bytes: int) -> None:
        self.folder, self.client_bytes = folder, client_bytes
        self._owners: dict[str, set[str]] = {}
        self._received = Counter[tuple[str, int]]()
        """Bytes by address and minute."""

    def add(self, paths: Iterable[str], session: str) -> None:
        """Allow a session to use files, if they are in the folder."""
        for path in paths:
            if self._is_inside(path):
                self._owners.setdefault(path, set()).add(session)

    def belongs(self, path: object, session: str) -> bool:
        """Return whether a session may use a file: it uploaded it, or the file was made for it."""
        return isinstance(path, str) and session in self._owners.get(path, ()) and self._is_inside(path)

    def count(self, address: str, size: int) -> bool:
        """Count bytes that an address uploads; return False if they are too many."""
        minute = _minute()
        self._received[address, minute] += size
        return sum(self._received[address, minute - age] for age in range(KEPT + 1)) <= self.client_bytes

    def delete_old(self) -> None:
        """Delete all files that are older than ``KEPT`` minutes."""
        for path in self.folder.rglob("*"):
            try:
                if not path.is_dir() and time.time() - path.lstat().st_ctime > KEPT * 60:
                    path.unlink()
            except OSError:  # already deleted, or open on Windows: tried again
                continue
        self._owners = {path: owners for path, owners in self._owners.items() if Path(path).exists()}
        oldest = _minute() - KEPT
        self._received = Counter({key: size for key, size in self._received.items() if key[1] >= oldest})

    def _is_inside(self, name: str) -> bool:
        try:
            return Path(name).is_absolute() and Path(name).resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # a name that is too long or contains NUL
            return False


def _minute() -> int:
    return int(time.monotonic() // 60)
