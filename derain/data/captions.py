"""Captions of training images: tables in DA-CLIP's format, and the journal of an unfinished table."""

import csv
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from derain.data.pairs import Pair
from derain.errors import DerainError
from derain.image_sources import ImageFile
from derain.images import write_whole
from derain.progress import track

COLUMNS = ["filepath", "title"]
"""Columns of a table: path of the rainy image, and `Caption.title`."""

DEGRADATION = "rainy"
"""DA-CLIP's word for rain."""

TEMPLATE = "a photo"
"""Caption of every clean image if no captioning model is used."""


class Caption(NamedTuple):
    """Caption of an image pair.

    Attributes:
        text: Description of the clean image.
        degradation: Word for the degradation of the rainy image.
    """

    text: str
    degradation: str

    @property
    def title(self) -> str:
        """Text and degradation in DA-CLIP's format.

        Example:
            >>> Caption("a street at night", "rainy").title
            'a street at night: rainy'
        """
        return f"{self.text}: {self.degradation}"


def one_line(text: str) -> str:
    """Replace each run of whitespace by one space, and remove it at both ends.

    Example:
        >>> one_line(" a dog  on grass ")
        'a dog on grass'
    """
    return " ".join(text.split())


def write_captions(path: Path, rows: Iterable[tuple[str, Caption]]) -> None:
    """Write a table in the format of DA-CLIP's script: tab-separated, quoted where needed.

    The file is written completely or not at all.

    Args:
        path: File to write.
        rows: Path of each rainy image as returned by :func:`table_paths`, and its caption.
    """
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for image_path, caption in rows:
            writer.writerow([image_path, Caption(one_line(caption.text), caption.degradation).title])


def read_captions(path: Path) -> dict[str, Caption]:
    """Read a table written by derain or by DA-CLIP's script.

    Returns:
        Captions by the path of the rainy image, as written in the table.

    Raises:
        DerainError: If the file does not exist or is not UTF-8, a line has another format, or an image has two
            captions. The message names the line.
    """
    text = _read_utf8(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    captions: dict[str, Caption] = {}
    line = 1
    try:
        if next(reader, None) != COLUMNS:
            raise DerainError(f"{path}:1: not a table of captions; expected 'filepath<TAB>title' as the first line")
        line = reader.line_num + 1
        for row in reader:
            image_path, caption = _parse_row(row, f"{path}:{line}")
            if image_path in captions:
                raise DerainError(f"{path}:{line}: second caption of {image_path}; remove one of the lines")
            captions[image_path] = caption
            line = reader.line_num + 1
    except csv.Error as error:
        raise DerainError(f"{path}:{line}: {error}; correct the quotation marks of the line") from error
    return captions


def _read_utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; create it by: derain caption DATASET {path}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DerainError(f"{path}:{line}: not UTF-8; save the table as UTF-8") from error


def _parse_row(row: list[str], location: str) -> tuple[str, Caption]:
    if len(row) != len(COLUMNS):
        raise DerainError(f"{location}: {len(row)} columns; expected 2, separated by a tab; correct the line")
    image_path, title = row
    text, separator, degradation = title.rpartition(": ")
    if not separator:
        raise DerainError(f"{location}: {title[:60]!r} has no ': '; expected 'CAPTION: DEGRADATION'")
    return image_path, Caption(text, degradation)


def match_captions(pairs: Sequence[Pair], tables: Mapping[Path, Mapping[str, Caption]]) -> list[Caption]:
    """Return the caption of each pair, found by the file of its rainy image.

    Args:
        pairs: The pairs.
        tables: Results of :func:`read_captions` by the file of the table. The paths of images are absolute, or
            relative to the folder of the table.

    Returns:
        Captions in the order of ``pairs``.

    Raises:
        DerainError: If a pair has no caption, an image has two different captions, or images are in shards.
    """
    captions: dict[str, Caption] = {}
    for table, table_captions in tables.items():
        files = _normalized([table.parent / image_path for image_path in table_captions])
        for (image_path, caption), file in zip(table_captions.items(), files, strict=True):
            if captions.setdefault(file, caption) != caption:
                raise DerainError(
                    f"{table}: {image_path} has another caption, in another table or under another spelling of its "
                    "path; remove one of the two"
                )
    files = _normalized(_paths([pair.rainy for pair in pairs]))
    missing = [pair.rainy for pair, file in zip(pairs, files, strict=True) if file not in captions]
    if missing:
        raise DerainError(
            f"{', '.join(map(str, tables))}: no caption for {len(missing)} of {len(pairs)} rainy images, first "
            f"{missing[0]}; expected paths that are absolute or relative to "
            f"{' or '.join(str(table.parent) for table in tables)}; create a table by: derain caption DATASET OUT.tsv, "
            "and list several tables as --data.captions '[A.tsv, B.tsv]'"
        )
    return [captions[file] for file in files]


def table_paths(images: Sequence[ImageFile], table: Path) -> list[str]:
    """Return the paths of images as a table contains them: relative for images below the table's folder, else absolute.

    Args:
        images: The images.
        table: File of the table.

    Raises:
        DerainError: If a path is not valid UTF-8, or images are in shards.

    Example:
        >>> table_paths([Path("set/rain-1.png")], Path("captions.tsv"))
        ['set/rain-1.png']
    """
    folder = table.parent.resolve()
    image_paths = []
    for file in _absolute(_paths(images)):
        image_path = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
        try:
            image_path.encode()
        except UnicodeEncodeError as error:
            raise DerainError(f"{image_path!r}: file name is not UTF-8, as tables require; rename the file") from error
        image_paths.append(image_path)
    return image_paths


def _paths(images: Sequence[ImageFile]) -> list[Path]:
    """Return the images as paths.

    Raises:
        DerainError: If an image is in a shard: tables contain paths of files.
    """
    paths = []
    for image in images:
        if not isinstance(image, Path):
            raise DerainError(f"{image}: captions belong to image files, not to shards; give the folder of the files")
        paths.append(image)
    return paths


def _absolute(files: Sequence[Path]) -> list[Path]:
    """Return absolute paths with links to folders resolved.

    Links to files are not resolved, since several of them may have the same target.
    """
    folders = {file.parent for file in files}
    resolved = {folder: folder.resolve() for folder in folders}
    return [resolved[file.parent] / file.name for file in files]


def _normalized(files: Sequence[Path]) -> list[str]:
    """Return absolute paths in Unicode's composed form (NFC), since systems differ in how they write accents."""
    return [unicodedata.normalize("NFC", str(file)) for file in _absolute(files)]


class JournalEntry(NamedTuple):
    """Finished caption.

    Attributes:
        image_path: Path of the rainy image, as it will be written in the table.
        text: The caption.
        image_hash: :func:`file_hash` of the clean image; empty if the captioner does not use images.
    """

    image_path: str
    text: str
    image_hash: str


class Journal:
    """File with the finished captions of an unfinished table, from which an interrupted run resumes.

    The first line contains the settings of the run, each further line one caption.

    Args:
        path: The file.
        settings: Settings of the run that the captions depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, str | int]) -> None:
        self.path, self.settings = path, dict(settings)
        self._header = json.dumps(self.settings).encode()

    def begin(self, file_pairs: Sequence[tuple[str, ImageFile]], overwrite: bool = False) -> list[JournalEntry]:
        """Create the file, or read the entries of an interrupted run and remove an incomplete last line.

        Args:
            file_pairs: For each pair, the path of the rainy image as it will be written in the table, and the file of
                the clean image.
            overwrite: Whether to replace a file from which this run cannot resume.

        Returns:
            The entries in the file; they belong to the first pairs.

        Raises:
            DerainError: If the run cannot resume, and ``overwrite`` is false: the file is damaged or belongs to a run
                with other settings or pairs, or a captioned image has changed or is missing.
        """
        try:
            entries = self._read_entries(file_pairs)
        except DerainError:
            if not overwrite:
                raise
            entries = None
        if entries is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self._header + b"\n")
        return entries or []

    def add(self, entries: Iterable[JournalEntry]) -> None:
        """Append entries."""
        with self.path.open("ab") as file:
            file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))

    def _read_entries(self, file_pairs: Sequence[tuple[str, ImageFile]]) -> list[JournalEntry] | None:
        """Return the entries in the file, and remove an incomplete last line.

        Returns None if there is no file, or its first line is incomplete.
        """
        if not self.path.is_file():
            return None
        content = self.path.read_bytes()
        if self._header.startswith(content):
            return None
        complete = content[: content.rfind(b"\n") + 1]
        header, *lines = complete.splitlines() or [content]
        if header != self._header:
            raise self._resume_error(self._difference(header))
        entries = [self._parse(line) for line in lines]
        if len(entries) > len(file_pairs):
            raise self._resume_error(f"has {len(entries)} captions, but the data set has {len(file_pairs)} pairs")
        for entry, (image_path, _) in zip(entries, file_pairs, strict=False):
            if entry.image_path != image_path:
                raise self._resume_error(f"has a caption of {entry.image_path} where this run expects {image_path}")
        self._check_images(entries, [clean for _, clean in file_pairs])
        os.truncate(self.path, len(complete))
        return entries

    def _check_images(self, entries: Sequence[JournalEntry], clean_files: Sequence[ImageFile]) -> None:
        hashes = {}
        for entry, clean in zip(entries, clean_files, strict=False):
            if entry.image_hash:
                hashes[clean] = entry.image_hash
        with ThreadPoolExecutor() as threads:
            current_hashes = track(threads.map(file_hash, hashes), "Comparing", len(hashes))
            for clean, current in zip(hashes, current_hashes, strict=True):
                if current != hashes[clean]:
                    raise self._resume_error(f"has a caption of {clean}, which has changed since")

    def _parse(self, line: bytes) -> JournalEntry:
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise self._resume_error("is damaged") from error
        if not (isinstance(fields, list) and len(fields) == 3 and all(isinstance(part, str) for part in fields)):
            raise self._resume_error("is damaged")
        return JournalEntry(*fields)

    def _difference(self, header: bytes) -> str:
        """Return how the settings in the file differ from those of this run."""
        try:
            saved = json.loads(header)
        except ValueError:
            saved = None
        if not isinstance(saved, dict) or not self.settings.keys() & saved.keys():
            return "is not an unfinished table of captions"
        key = next(key for key in self.settings | saved if saved.get(key) != self.settings.get(key))
        return f"was started with {key} {saved.get(key)}, not {self.settings.get(key)}"

    def _resume_error(self, reason: str) -> DerainError:
        return DerainError(f"{self.path}: {reason}; delete it, or add --overwrite to start again")


def file_hash(path: ImageFile) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256.

    Raises:
        DerainError: If the file does not exist.
    """
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; check the path") from error
