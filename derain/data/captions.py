"""Captions of training images: a table in DA-CLIP's form, and the journal that a table is made from."""

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
from derain.images import write_whole
from derain.progress import track

COLUMNS = ["filepath", "title"]
"""The table's first line: a rainy image's file, and what stands in it."""

DEGRADATION = "rainy"
"""DA-CLIP's word for rain."""

TEMPLATE = "a photo"
"""The caption of any clean image, where no model makes one."""


class Caption(NamedTuple):
    """What the clean image shows, and what is wrong with the other one."""

    text: str
    degradation: str

    @property
    def title(self) -> str:
        """As DA-CLIP writes it.

        Example:
            >>> Caption("a street at night", "rainy").title
            'a street at night: rainy'
        """
        return f"{self.text}: {self.degradation}"


def one_line(text: str) -> str:
    """Makes tabs, newlines and other gaps one space each.

    Example:
        >>> one_line(" a dog  on grass ")
        'a dog on grass'
    """
    return " ".join(text.split())


# The table.


def write_captions(path: Path, rows: Iterable[tuple[str, Caption]]) -> None:
    """Writes a table whole or not at all: tab-separated, quoted where needed, as DA-CLIP's script does.

    Args:
        path: The table.
        rows: A rainy image's file, as :func:`table_paths` gives it, and its caption.
    """
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((name, caption._replace(text=one_line(caption.text)).title) for name, caption in rows)


def read_captions(path: Path) -> dict[str, Caption]:
    """Reads a table, ours or of DA-CLIP's script.

    Returns:
        Captions by the rainy image's file, as it is written.

    Raises:
        DerainError: If the file is absent or no such table; with the number of the line.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; make it by: derain caption ROOT {path}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DerainError(f"{path}:{line}: not UTF-8; save the table in this encoding") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    captions: dict[str, Caption] = {}
    line = 1
    try:
        if next(reader, None) != COLUMNS:
            raise DerainError(f"{path}:1: expected the line 'filepath<TAB>title'; is it a table of captions?")
        line = reader.line_num + 1
        for row in reader:
            if len(row) != len(COLUMNS):
                raise DerainError(f"{path}:{line}: {len(row)} columns, expected 2 with a tab between; correct the line")
            name, title = row
            parts = title.rsplit(": ", 1)
            if len(parts) != 2:
                raise DerainError(f"{path}:{line}: {title[:60]!r} has no ': '; expected 'CAPTION: DEGRADATION'")
            if name in captions:
                raise DerainError(f"{path}:{line}: a second caption of {name}; remove one of the lines")
            captions[name] = Caption(*parts)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DerainError(f"{path}:{line}: {error}; correct the quotation marks of the line") from error
    return captions


def match_captions(pairs: Sequence[Pair], tables: Mapping[Path, Mapping[str, Caption]]) -> list[Caption]:
    """The caption of each pair, in order, by the file of its rainy image.

    Args:
        pairs: The pairs.
        tables: What :func:`read_captions` gave, by file; paths in a table are absolute or start at its folder.

    Raises:
        DerainError: If a pair has none, or one file two.
    """
    found: dict[str, Caption] = {}
    for path, table in tables.items():
        for (name, caption), file in zip(table.items(), _spelt([path.parent / name for name in table]), strict=True):
            if found.setdefault(file, caption) != caption:
                raise DerainError(
                    f"{path}: two captions of {name}, in another table or by another spelling of its path; remove one"
                )
    captions = [found.get(file) for file in _spelt([pair.rainy for pair in pairs])]
    lacking = [pair.rainy for pair, caption in zip(pairs, captions, strict=True) if caption is None]
    if lacking:
        raise DerainError(
            f"{', '.join(map(str, tables))}: no caption of {len(lacking)} of {len(pairs)} rainy images, first "
            f"{lacking[0]}; expected their paths, absolute or from {' or '.join(str(path.parent) for path in tables)}; "
            "make a table by: derain caption ROOT OUT.tsv, and give several as --data.captions '[A.tsv, B.tsv]'"
        )
    return [caption for caption in captions if caption is not None]


def table_paths(images: Sequence[Path], table: Path) -> list[str]:
    """Rainy images' files as they stand in a table: from its folder where they lie below it, else absolute.

    Raises:
        DerainError: If a name cannot be written.

    Example:
        >>> table_paths([Path("set/rain-1.png")], Path("captions.tsv"))
        ['set/rain-1.png']
    """
    folder = table.parent.resolve()
    names = []
    for file in _places(images):
        name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DerainError(f"{name!r}: is no UTF-8 and cannot stand in a table; rename it") from error
        names.append(name)
    return names


def _places(files: Sequence[Path]) -> list[Path]:
    """Absolute paths; links of folders are followed, but not those of files: two of them may be one file."""
    real = {folder: folder.resolve() for folder in {file.parent for file in files}}
    return [real[file.parent] / file.name for file in files]


def _spelt(files: Sequence[Path]) -> list[str]:
    """Absolute paths in Unicode's composed form (NFC): a table may come from a system that writes accents otherwise."""
    return [unicodedata.normalize("NFC", str(file)) for file in _places(files)]


# The journal.


class JournalEntry(NamedTuple):
    """A caption that is done.

    Attributes:
        file: The rainy image, as it will stand in the table.
        text: The caption.
        image: Hash of the clean image's file, empty where it was not looked at.
    """

    file: str
    text: str
    image: str


class Journal:
    """Captions as they come, in a file that outlives the process: what the run is, then one row a line.

    Args:
        path: The file.
        run: What the captions depend on besides the images.
    """

    def __init__(self, path: Path, run: Mapping[str, str | int]) -> None:
        self.path, self.run = path, dict(run)
        self._first = json.dumps(self.run).encode()

    def begin(self, pairs: Sequence[tuple[str, Path]], overwrite: bool = False) -> list[JournalEntry]:
        """Starts the file, or goes on with what an earlier process left; a last line that it half wrote is dropped.

        Args:
            pairs: Every rainy image's file as it will stand in the table, and the file of its clean image.
            overwrite: Whether what another run left may go.

        Returns:
            The rows that are there already, those of the first pairs.

        Raises:
            DerainError: If the file is another run's, or one of its images has changed.
        """
        try:
            rows = self._earlier(pairs)
        except DerainError:
            if not overwrite:
                raise
            rows = None
        if rows is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self._first + b"\n")
        return rows or []

    def add(self, rows: Iterable[JournalEntry]) -> None:
        """Appends rows."""
        with self.path.open("ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def _earlier(self, pairs: Sequence[tuple[str, Path]]) -> list[JournalEntry] | None:
        """What the file holds, None if not even its first line is whole."""
        if not self.path.is_file():
            return None
        content = self.path.read_bytes()
        if self._first.startswith(content):
            return None
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [content]
        if first != self._first:
            raise self._refused(self._difference(first))
        rows = [self._row(line) for line in lines]
        if len(rows) > len(pairs):
            raise self._refused(f"has {len(rows)} rows, the set has {len(pairs)} pairs")
        for row, (file, _) in zip(rows, pairs, strict=False):
            if row.file != file:
                raise self._refused(f"has a caption of {row.file} where this run has {file}")
        seen = {clean: row.image for row, (_, clean) in zip(rows, pairs, strict=False) if row.image}
        with ThreadPoolExecutor() as threads:
            for clean, now in zip(seen, track(threads.map(file_hash, seen), "Comparing", len(seen)), strict=True):
                if now != seen[clean]:
                    raise self._refused(f"has a caption of {clean}, which has changed since")
        os.truncate(self.path, len(whole))
        return rows

    def _row(self, line: bytes) -> JournalEntry:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise self._refused("is damaged") from error
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(part, str) for part in row)):
            raise self._refused("is damaged")
        return JournalEntry(*row)

    def _difference(self, first: bytes) -> str:
        """What the run that the file begins with has else."""
        try:
            told = json.loads(first)
        except ValueError:
            told = None
        if not isinstance(told, dict) or not self.run.keys() & told.keys():
            return "is no unfinished table of captions"
        key = next(key for key in self.run | told if told.get(key) != self.run.get(key))
        return f"is of a run with {key} {told.get(key)}, not {self.run.get(key)}"

    def _refused(self, why: str) -> DerainError:
        return DerainError(f"{self.path}: {why}; delete it or give --overwrite to begin anew")


def file_hash(path: Path) -> str:
    """Hash of a file, to see whether it has changed.

    Raises:
        DerainError: If there is no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except FileNotFoundError as error:
        raise DerainError(f"{path}: no such file; check the path") from error
