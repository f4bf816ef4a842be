"""Fetch a data set from a source, or unpack its archives, check it, and put it into the data root.

A download is collected in a hidden folder ``.NAME.part`` of the data root, where a later call continues it. When all
files are complete, checked and unpacked, their folder is renamed to that of the data set.
"""

import errno
import filecmp
import json
import logging
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import filelock
from rich.filesize import decimal

from derain.data.archives import DamagedArchiveError, Member, free_bytes, is_archive, list_members, unpack
from derain.data.hub_files import download_repository, list_repository
from derain.data.layouts import LAYOUTS, Split
from derain.data.name_matching import pair_files
from derain.data.remote_files import Listing, RemoteFile, check_downloads, downloaded_bytes, partial_path
from derain.data.sources import Hub, Source, Web, target_folder
from derain.data.web_files import download_urls, list_urls
from derain.errors import DerainError, Stopped
from derain.images import write_whole
from derain.listing import SUFFIXES, natural_key
from derain.progress import track_bytes

log = logging.getLogger("derain")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exhausted quota."""


@dataclass(frozen=True)
class Download:
    """Download of a data set, which may have been interrupted.

    Attributes:
        name: Name of the data set.
        source: Its source.
        listing: Files of the source.
        target: Folder of the data set.
    """

    name: str
    source: Hub | Web
    listing: Listing
    target: Path

    @property
    def part(self) -> Path:
        """Hidden folder beside the target, in which the download is collected."""
        return self.target.with_name(f".{self.target.name}.part")

    @property
    def download_folder(self) -> Path:
        """Folder of the downloaded files."""
        return self.part / "download"

    @property
    def archives(self) -> list[RemoteFile]:
        """Files to unpack after the download: archives of the hub; all files of web servers, whatever their suffix."""
        return [file for file in self.listing.files if isinstance(self.source, Web) or is_archive(file.path)]

    @property
    def missing_bytes(self) -> int:
        """Number of bytes that have not been downloaded yet."""
        return max(0, self.listing.size - downloaded_bytes(self.listing.files, self.download_folder))

    @property
    def needed_bytes(self) -> int:
        """Bytes of disk space that the rest of the download needs, and all archives once more to be unpacked."""
        return self.missing_bytes + sum(file.size or 0 for file in self.archives)

    def run(self) -> Path:
        """Download, check and unpack the files; return the folder of the data set.

        Raises:
            DerainError: If the data set exists already, another process is fetching it, an earlier call used another
                source, the disk is too small, the server fails, a file is damaged, or an archive is unsafe. Undamaged
                files are kept, and the next call continues. Also if the complete data set has no pairs that its layout
                recognises; it is kept then.
            OSError: If a file cannot be read or written for another reason than a full disk.
            Stopped: If the download is interrupted; files are kept as well.
        """
        check_absent(self.target)
        check_space(self.target.parent, self.needed_bytes)
        self.download_folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.part), self._interruptions():
            check_absent(self.target)  # another process may have completed it since
            self._remove_changed_files()
            done = self.listing.size - self.missing_bytes
            with track_bytes(f"Fetching {self.name}", self.listing.size, done) as advance:
                if isinstance(self.source, Hub):
                    repository, patterns = self.source.repository, self.source.patterns
                    download_repository(repository, self.listing.commit, patterns, self.download_folder, advance)
                else:
                    download_urls(self.listing.files, self.download_folder, advance)
            check_downloads(self.listing.files, self.download_folder)
            shutil.rmtree(self.download_folder / ".cache", ignore_errors=True)  # of huggingface_hub
            move_to_target(self.name, self._unpacked(), self.target)
            shutil.rmtree(self.part)  # within the lock: another process may begin as soon as it is released
        files = [path.relative_to(self.target).as_posix() for path in self.target.rglob("*") if path.is_file()]
        check_pairs(self.name, files, f"{self.target}: complete and without damage, but")
        return self.target

    def _unpacked(self) -> Path:
        """Return the folder of the files after unpacking; delete a damaged archive.

        Raises:
            DerainError: If an archive is damaged or unsafe, the disk is too small, or files of the source and of its
                archives cannot be combined, see `_move_beside`.
        """
        archives = self.archives
        if not archives:
            return self.download_folder
        folder = self.part / "unpacked"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            unpack_all([self.download_folder / file.path for file in archives], folder)
        except DamagedArchiveError as error:
            error.archive.unlink()
            raise DerainError(
                f"{error.archive.name}: arrived {error.reason}; deleted; run the same command to fetch it again"
            ) from error
        unpacked = set(archives)
        self._move_beside([file.path for file in self.listing.files if file not in unpacked], folder)
        return folder

    def _move_beside(self, paths: Sequence[str], folder: Path) -> None:
        """Move downloaded files into the folder of the unpacked archives, except those that archives contain too.

        Args:
            paths: Paths of the downloaded files in their folder.
            folder: Folder of the unpacked archives.

        Raises:
            DerainError: If an image is in both, or an archive has a folder of the same path; nothing is moved then.
        """
        present = [path for path in paths if (folder / path).exists()]
        for path in present:
            if PurePosixPath(path).suffix.lower() in SUFFIXES or not (folder / path).is_file():
                raise DerainError(
                    f"{self.source}: {path} is both a file of the source and in one of its archives; fetch them "
                    "yourself"
                )
        different = [
            path for path in present if not filecmp.cmp(self.download_folder / path, folder / path, shallow=False)
        ]
        if different:
            more = f" and {len(different) - 1} more files" if len(different) > 1 else ""
            log.warning("%s: also in an archive, whose version is kept: %s%s", self.source, different[0], more)
        for path in sorted(set(paths) - set(present)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.download_folder / path).rename(folder / path)

    def _remove_changed_files(self) -> None:
        """Remove files that an earlier call downloaded and that have changed on the server since; save the listing.

        Raises:
            DerainError: If the earlier call used another source.
        """
        listing_file = self.part / "files.json"
        current = {file.path: [file.size, file.sha256, file.blob_id, file.version] for file in self.listing.files}
        if listing_file.is_file():
            earlier = json.loads(listing_file.read_text())
            if earlier["source"] != str(self.source):
                raise DerainError(
                    f"{self.part}: contains a part of {earlier['source']}; use the same --from to continue it, or "
                    f"delete the folder to fetch {self.source}"
                )
            changed = [path for path, state in earlier["files"].items() if current.get(path) != state]
            for path in changed:
                for file in (self.download_folder / path, partial_path(self.download_folder / path)):
                    file.unlink(missing_ok=True)
            if changed:
                log.info("fetching %d files again, which have changed on the server: %s", len(changed), changed[0])
        with write_whole(listing_file) as temporary:
            temporary.write_text(json.dumps({"source": str(self.source), "files": current}))

    @contextmanager
    def _interruptions(self) -> Iterator[None]:
        """Add to the message of a full disk, or of an interruption, how much of the download is kept, and where."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise DerainError(
                f"{self.target.parent}: disk full; {self._progress()} are kept in {self.part}; free at least "
                f"{decimal(self.needed_bytes)} and run the same command again"
            ) from error
        except KeyboardInterrupt as interrupt:
            number = interrupt.code - 128 if isinstance(interrupt, Stopped) else signal.SIGINT
            reason = str(interrupt) or "interrupted"
            raise Stopped(
                f"{reason}; {self._progress()} are kept in {self.part}; the same command continues", number
            ) from interrupt

    def _progress(self) -> str:
        """Return text such as ``2.1 MB of 8.4 MB``."""
        present = downloaded_bytes(self.listing.files, self.download_folder)
        return f"{decimal(present)} of {decimal(self.listing.size)}"


def plan_download(name: str, source: Source, root: Path) -> Download:
    """Return the download of a data set, after asking the server for its files.

    Args:
        name: Name of the data set.
        source: Its source: a repository of the hub or a web server.
        root: Data root.

    Raises:
        DerainError: If the server cannot be reached or has no such files, or the source is a form.
    """
    if isinstance(source, Hub):
        listing = list_repository(source.repository, source.revision, source.patterns)
    elif isinstance(source, Web):
        listing = list_urls(source.urls, source.sha256)
    else:
        raise DerainError(f"{source}: cannot be fetched by a program; download the files in a browser, then --archive")
    return Download(name, source, listing, root / target_folder(name))


def unpack_set(name: str, archives: Sequence[Path], root: Path) -> Path:
    """Unpack the archives of a data set that the user has downloaded; return the folder of the data set.

    Args:
        name: Name of the data set.
        archives: Its zip or tar archives.
        root: Data root.

    Raises:
        DerainError: If the data set exists already, an archive is missing, damaged or unsafe, the archives contain no
            pairs of the data set, or the disk is too small.
    """
    target = root / target_folder(name)
    check_absent(target)
    members = [member for archive in archives for member in list_members(archive)]
    check_pairs(name, [member.path for member in members], f"{', '.join(map(str, archives))}:")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=root) as temporary:
        folder = Path(temporary) / "unpacked"
        try:
            unpack_all(archives, folder)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            needed = decimal(_unpacked_size(members))
            raise DerainError(f"{root}: disk full; free {needed} and run the command again") from error
        move_to_target(name, folder, target)
    return target


def unpack_all(archives: Sequence[Path], folder: Path) -> None:
    """Unpack archives into one folder, after a check of the disk space.

    Args:
        archives: Zip or tar archives.
        folder: Target folder.

    Raises:
        DerainError: If the disk is too small, or an archive is damaged or unsafe.
    """
    size = sum(_unpacked_size(list_members(archive)) for archive in archives)
    check_space(folder, size)
    with track_bytes("Unpacking", size) as advance:
        for archive in archives:
            unpack(archive, folder, advance)


def _unpacked_size(members: Sequence[Member]) -> int:
    return sum(member.size for member in members)


def move_to_target(name: str, folder: Path, target: Path) -> None:
    """Rename the folder that contains the pairs of a data set to the folder of the data set.

    Files outside the folder of the pairs, such as a licence, are first moved into it, unless it contains a file of the
    same name. A warning reports files that are not moved.

    Args:
        name: Name of the data set.
        folder: Folder of the downloaded or unpacked files, which may contain the pairs in a subfolder.
        target: Folder of the data set, which must not exist.
    """
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    prefix, _ = find_pair_folder(name, files)
    base = folder / prefix
    dropped = []
    for file in files:
        if prefix and not file.startswith(prefix):
            beside = base / PurePosixPath(file).name
            if beside.exists():
                dropped.append(file)
            else:
                (folder / file).rename(beside)
    if dropped:
        log.warning("%s: %d files not kept, since other files have their names: %s", target, len(dropped), dropped[0])
    base.rename(target)


def find_pair_folder(name: str, files: Sequence[str]) -> tuple[str, dict[Split, int]]:
    """Find the folder with the pairs of a data set in a list of files, and count the pairs.

    Args:
        name: Name of the data set.
        files: Paths with ``/``.

    Returns:
        Path of the folder to which the patterns of the layout are relative, with ``/`` at its end, and the number of
        pairs of each split that has any. The path is empty for the folder of the list itself. Both are empty if there
        are no pairs.

    Example:
        >>> find_pair_folder("Rain12", ["LICENSE", "Rain12/input/1.png", "Rain12/target/1.png"])
        ('Rain12/', {'test': 1})
    """
    images = sorted((file for file in files if PurePosixPath(file).suffix.lower() in SUFFIXES), key=natural_key)
    prefix = ""
    while images:
        counts = {split: len(pair_files(name, split, Path(), images).pairs) for split in LAYOUTS[name].files}
        if any(counts.values()):
            return prefix, {split: count for split, count in counts.items() if count}
        folders = {image.partition("/")[0] for image in images if "/" in image}
        if len(folders) != 1 or not all("/" in image for image in images):
            break
        folder = f"{folders.pop()}/"
        prefix += folder
        images = [image.removeprefix(folder) for image in images]
    return "", {}


def check_pairs(name: str, files: Sequence[str], subject: str) -> None:
    """Check that a list of files contains pairs of a data set.

    Args:
        name: Name of the data set.
        files: Paths with ``/``.
        subject: Beginning of the error message.

    Raises:
        DerainError: If there are no pairs.
    """
    if not find_pair_folder(name, files)[1]:
        expected = " or ".join(str(variants[0]) for variants in LAYOUTS[name].files.values())
        raise DerainError(
            f"{subject} no {name} pairs; contains {describe_files(files)}; expected {expected}; rename the folders, or "
            "use another source"
        )


def describe_files(files: Sequence[str]) -> str:
    """Return the number and the folders of files as text.

    Example:
        >>> describe_files(["a/b/1.png", "a/b/2.png", "a/c/1.png"])
        '3 files in a/b, a/c'
    """
    folders = sorted({str(PurePosixPath(file).parent) for file in files}, key=natural_key)
    more = f" and {len(folders) - 6} more folders" if len(folders) > 6 else ""
    return f"{len(files)} files in {', '.join(folders[:6])}{more}" if files else "no files"


def check_absent(target: Path) -> None:
    """Check that the folder of a data set does not exist yet.

    Raises:
        DerainError: If it exists.
    """
    if target.exists():
        raise DerainError(
            f"{target}: exists; check it by derain data verify {target}, or rename or delete it to fetch it again"
        )


def check_space(folder: Path, needed: int) -> None:
    """Check the free disk space at a folder.

    Args:
        folder: The folder, which need not exist yet.
        needed: Needed space in bytes.

    Raises:
        DerainError: If fewer bytes are free than needed.
    """
    free = free_bytes(folder)
    if needed > free:
        raise DerainError(
            f"{folder}: {decimal(free)} free, {decimal(needed)} needed; free {decimal(needed - free)}, or use another "
            "disk by --root"
        )


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    lock = filelock.FileLock(part / "lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except filelock.Timeout as error:
        raise DerainError(f"{part}: another process is fetching this data set; wait until it ends") from error
