"""List the image files of a folder in natural order, and the files that are skipped."""

import functools
import logging
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from derain.image_metadata import JPEG

SUFFIXES = JPEG | {".png", ".webp", ".avif", ".tif", ".tiff", ".bmp"}
"""Suffixes of images that derain reads, in lower case."""

UNREAD_SUFFIXES = frozenset(
    {".gif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".exr", ".hdr", ".tga"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
)
"""Suffixes of images that derain cannot read, in lower case; a warning names such files."""

NUMBER = re.compile(r"(\d+)")

log = logging.getLogger("derain")


def natural_key(path: Path | str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``2.png`` before ``10.png``.

    Example:
        >>> sorted(["b/10.png", "b/2.png"], key=natural_key)
        ['b/2.png', 'b/10.png']
    """
    parts = NUMBER.split(str(path))
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


class Listing(NamedTuple):
    """Image files of a folder.

    Attributes:
        files: Image files with accepted suffixes, in natural order.
        skipped: Files and folders that were skipped, by reason: a suffix such as ``.gif``, ``broken link``,
            ``special file``, ``unreadable folder``, ``repeated folder`` (a link to a folder that is already listed).
    """

    files: list[Path]
    skipped: dict[str, list[Path]]

    def note(self) -> str:
        """Return one line about skipped files and folders; empty if there are none.

        Example:
            >>> Listing([], {".gif": [Path("a.gif"), Path("b.gif")]}).note()
            'skipped 2 .gif (a.gif, b.gif)'
        """
        parts = []
        for reason, paths in self.skipped.items():
            names = [path.name for path in paths[:3]]
            if len(paths) > 3:
                names.append("…")
            parts.append(f"{len(paths)} {reason} ({', '.join(names)})")
        return f"skipped {', '.join(parts)}" if parts else ""


def image_files(folder: Path, *, recursive: bool = False, suffixes: frozenset[str] = SUFFIXES) -> list[Path]:
    """Return the image files of a folder in natural order, without hidden ones; warn once about what is skipped.

    Links to files are followed; so are links to folders if ``recursive``. Each folder is listed once, by a path without
    links if there is one.

    Args:
        folder: Folder to list.
        recursive: Whether to list its subfolders too.
        suffixes: Accepted suffixes, in lower case.

    Raises:
        OSError: If the folder does not exist or cannot be read.
    """
    listing = list_images(folder, recursive=recursive, suffixes=suffixes)
    _warn_of_skipped(folder, listing)
    return listing.files


def image_names(folder: Path, *, warn: bool = True) -> list[str]:
    """Return the image files in a folder and its subfolders as `image_files` does, but unsorted and as text.

    Args:
        folder: Folder to list.
        warn: Whether to warn once about what is skipped.

    Returns:
        Paths relative to the folder, with ``/``, in the order of the file system.

    Raises:
        OSError: If the folder does not exist or cannot be read.
    """
    skipped: dict[str, list[Path]] = defaultdict(list)
    entries = _select(_walk(folder, True, skipped), SUFFIXES, skipped)
    prefix = "" if folder == Path() else f"{folder.as_posix().rstrip('/')}/"
    names = [os.fspath(entry).replace(os.sep, "/").removeprefix(prefix).removeprefix("./") for entry in entries]
    if warn:
        _warn_of_skipped(folder, Listing([], _in_natural_order(skipped)))
    return names


def _warn_of_skipped(folder: Path, listing: Listing) -> None:
    if listing.skipped:
        message = f"{folder}: {listing.note()}"
        if not UNREAD_SUFFIXES.isdisjoint(listing.skipped):
            message += "; convert them to PNG or JPEG to include them"
        warn_once(message)


def list_images(folder: Path, *, recursive: bool = False, suffixes: frozenset[str] = SUFFIXES) -> Listing:
    """Return what `image_files` lists and what it skips, without a warning; arguments and errors are the same."""
    skipped: dict[str, list[Path]] = defaultdict(list)
    listing = select_images(_walk(folder, recursive, skipped), suffixes)
    listing.skipped.update(_in_natural_order(skipped))
    return listing


def select_images(paths: Iterable[Path | os.DirEntry[str]], suffixes: frozenset[str] = SUFFIXES) -> Listing:
    """Split paths into image files and skipped images; folders and files of other kinds are ignored."""
    skipped: dict[str, list[Path]] = defaultdict(list)
    files = [Path(path) for path in _select(paths, suffixes, skipped)]
    return Listing(sorted(files, key=natural_key), _in_natural_order(skipped))


def _select(
    paths: Iterable[Path | os.DirEntry[str]], suffixes: frozenset[str], skipped: dict[str, list[Path]]
) -> Iterator[Path | os.DirEntry[str]]:
    """Yield the image files among paths; add the skipped images to ``skipped`` by reason."""
    for path in paths:
        suffix = os.path.splitext(path.name)[1].lower()  # noqa: PTH122 - DirEntry has no suffix
        if suffix in suffixes and path.is_file():
            yield path
        elif suffix in suffixes and not path.is_dir():
            skipped["broken link" if path.is_symlink() else "special file"].append(Path(path))
        elif suffix in UNREAD_SUFFIXES and path.is_file():
            skipped[suffix].append(Path(path))


def _in_natural_order(skipped: dict[str, list[Path]]) -> dict[str, list[Path]]:
    return {reason: sorted(skipped[reason], key=natural_key) for reason in sorted(skipped)}


def _walk(top: Path, recursive: bool, skipped: dict[str, list[Path]]) -> Iterator[Path | os.DirEntry[str]]:
    """Yield the files of a folder, and of its subfolders if ``recursive``, but no hidden ones; enter each folder once.

    Files that are not links are yielded as DirEntry, whose kind is known without a system call for each file. Links to
    folders are followed after all other folders, so that a folder with a path without links is entered by this path.

    Args:
        top: Folder to list.
        recursive: Whether to enter subfolders.
        skipped: Receives the folders that are reached again or cannot be read.
    """
    entered: set[tuple[int, int]] = set()
    folders, links = [top], deque[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in entered:
                skipped["repeated folder"].append(folder)
                continue
            entered.add(identity)
            with os.scandir(folder) as iterator:
                entries = [entry for entry in iterator if not entry.name.startswith(".")]
        except PermissionError:
            if folder is top:
                raise
            skipped["unreadable folder"].append(folder)
            continue
        linked_folders = []
        for entry in entries:
            if entry.is_symlink():
                path = Path(entry)
                if path.is_dir():  # entry.is_dir() fails for a link to itself
                    linked_folders.append(path)
                else:
                    yield path
            elif not entry.is_dir():
                yield entry
            elif recursive:
                folders.append(Path(entry))
        if recursive:
            links += sorted(linked_folders, key=natural_key)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning unless this process has logged it before: a command may list a folder several times."""
    log.warning(message)
