"""Pair files by the key that a pattern extracts from their names, and find the folders of data sets.

:mod:`derain.data.layouts.patterns` defines patterns; a layout may have several variants of them. A key consists of the
values of all groups of the pattern except ``{version}``: ``{n}`` as a number, the others as text in lower case. With
the patterns ``rainy/{n}_{version}`` and ``clean/{n}``, ``rainy/7_2.jpg`` and ``clean/007.jpg`` have the key 7. No image
is read.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from derain.data.layouts import AUXILIARY, LAYOUTS, PLACEHOLDERS, SPLIT_FOLDERS, Files, Split
from derain.errors import DerainError
from derain.image_sources import ImageFile
from derain.listing import image_names, list_images, natural_key

_MAX_DEPTH = 3  # how many levels below the data root are searched for data sets

AUXILIARY_NAME = re.compile(AUXILIARY, re.IGNORECASE)
"""Compiled pattern of rain masks and streaks."""

Key = tuple[str | int, ...]
"""What a rainy and its clean file have in common: values of the groups of their patterns."""


class _KeyedFile(NamedTuple):
    key: Key
    rain_version: str | None  # text of ``{version}``; None if the pattern has none
    file: str


@dataclass(frozen=True)
class PairedFiles:
    """Files of one split, paired by a layout.

    Attributes:
        pairs: Name, rainy file and clean file (None without clean images) of each pair, in natural order of the names.
            The name of a frame of a video is ``SEQUENCE/FRAME``.
        unpaired: Files that match ``variant`` but have no partner.
        clashes: Pairs of conflicting files: two clean files with the same key; two rainy files with the same key and
            version; or two clean files that different variants of the layout assign to one rainy file.
        variant: Variant of the layout that matched; has an empty pattern if none did.
        unused: Later variants of the layout that match pairs which ``variant`` does not match, and the number of these
            pairs.
    """

    pairs: tuple[tuple[str, ImageFile, ImageFile | None], ...] = ()
    unpaired: tuple[Path, ...] = ()
    clashes: tuple[tuple[ImageFile, ImageFile], ...] = ()
    variant: Files = field(default_factory=lambda: Files(""))
    unused: tuple[tuple[Files, int], ...] = ()


def list_relative(root: Path, *, warn: bool = True) -> list[str]:
    """Return the paths of all images below a folder, relative to it, with ``/``, in natural order.

    Args:
        root: The folder.
        warn: Warn about skipped images.

    Raises:
        DerainError: If the folder does not exist.
        OSError: If the folder cannot be read.
    """
    return sorted(list_unsorted(root, warn=warn), key=natural_key)


def list_unsorted(root: Path, *, warn: bool = True) -> list[str]:
    """Return what `list_relative` returns, in the order of the file system; arguments and errors are the same."""
    if not root.is_dir():
        raise DerainError(f"{root}: no such folder; give the name of a data set or its folder")
    return image_names(root, warn=warn)


class ImageNames:
    """Names of the images below a folder, which can be paired by any layout.

    A variant that several layouts share is matched only once.

    Args:
        root: The folder.
        files: Paths of the images, relative to ``root``, with ``/``; listed by default.

    Raises:
        DerainError: If the folder does not exist.
    """

    def __init__(self, root: Path, files: Sequence[str] | None = None) -> None:
        self.root = root
        self.files = list_relative(root) if files is None else files
        self._stems = [_composed(file.rpartition(".")[0]) for file in self.files]
        self._paths: dict[str, Path] = {}
        self._paired: dict[tuple[str, Files], PairedFiles] = {}

    def pair(self, name: str, split: Split) -> PairedFiles:
        """Pair files by the first variant of a layout that matches any pair; return no pairs if none does.

        Args:
            name: Name of the layout.
            split: Split to look for. A layout without a split ``predict`` returns the rainy images of ``test`` for it.
        """
        variants = LAYOUTS[name].files
        source: Split = "test" if split == "predict" and "predict" not in variants else split
        matches = []
        for variant in variants.get(source, ()):
            for prefix in _prefixes(source):
                paired = self._pair_by_variant(prefix, variant)
                if paired.pairs:
                    matches.append(paired)
                    break
        if not matches:
            return PairedFiles()
        paired = _with_later_variants(matches[0], matches[1:])
        if split == "predict":
            return replace(paired, pairs=tuple((name, rainy, None) for name, rainy, _ in paired.pairs))
        return paired

    def matching_files(self, name: str, split: Split) -> list[Path]:
        """Return all files that match a rainy or clean pattern of a split, with or without a partner.

        Args:
            name: Name of the layout. Variants without a clean pattern are ignored.
            split: A split of the layout.
        """
        found: set[str] = set()
        for variant in LAYOUTS[name].files[split]:
            if variant.clean is None:
                continue
            for prefix in _prefixes(split):
                for pattern in (variant.rainy, variant.clean):
                    keyed_files = self._match_pattern(prefix + pattern, variant.numbers, auxiliary=variant.auxiliary)
                    found.update(keyed.file for keyed in keyed_files)
        return [self._path(file) for file in sorted(found, key=natural_key)]

    def _pair_by_variant(self, prefix: str, variant: Files) -> PairedFiles:
        paired = self._paired.get((prefix, variant))
        if paired is None:
            paired = self._paired[prefix, variant] = self._match_variant(prefix, variant)
        return paired

    def _match_variant(self, prefix: str, variant: Files) -> PairedFiles:
        rainy = self._match_pattern(prefix + variant.rainy, variant.numbers, auxiliary=variant.auxiliary)
        if not rainy:
            return PairedFiles(variant=variant)
        if variant.clean is not None:
            clean = self._match_pattern(prefix + variant.clean, variant.numbers)
            pairs, unpaired, clashes = _pair_by_key(rainy, clean)
        else:
            has_clean = variant.clean_side is not None and variant.truth
            pairs = [(keyed.file, keyed.file if has_clean else None) for keyed in rainy]
            unpaired, clashes = [], []
        rainy_files = [file for file, _ in pairs]
        names = _frame_names(rainy_files) if variant.video else _unique_names(rainy_files)
        named_pairs = [
            (name, self._path(rainy_file), None if clean_file is None else self._path(clean_file))
            for name, (rainy_file, clean_file) in zip(names, pairs, strict=True)
        ]
        return PairedFiles(
            pairs=tuple(sorted(named_pairs, key=lambda pair: natural_key(pair[0]))),
            unpaired=tuple(self._path(file) for file in sorted(unpaired, key=natural_key)),
            clashes=tuple((self._path(first), self._path(second)) for first, second in clashes),
            variant=variant,
        )

    def _match_pattern(
        self, pattern: str, numbers: tuple[int, int] | None, *, auxiliary: bool = False
    ) -> list[_KeyedFile]:
        """Return every file that matches a pattern, with its key.

        Args:
            pattern: Pattern as described in :mod:`derain.data.layouts.patterns`.
            numbers: First and last ``{n}`` of the split; None for all.
            auxiliary: Include files that are named like rain masks and streaks.
        """
        for placeholder, group in PLACEHOLDERS.items():
            pattern = pattern.replace(placeholder, group)
        fullmatch = re.compile(pattern, re.IGNORECASE).fullmatch
        keyed_files = []
        for file, stem in zip(self.files, self._stems, strict=True):
            match = fullmatch(stem)
            if match is None or (not auxiliary and AUXILIARY_NAME.fullmatch(stem)):
                continue
            groups = match.groupdict()
            if numbers and not numbers[0] <= int(groups["n"]) <= numbers[1]:
                continue
            rain_version = groups.pop("version", None)
            key = tuple(int(groups[name]) if name == "n" else groups[name].lower() for name in sorted(groups))
            keyed_files.append(_KeyedFile(key, rain_version, file))
        return keyed_files

    def _path(self, file: str) -> Path:
        """Return the path of a file; all variants share one object, to save time and memory."""
        path = self._paths.get(file)
        if path is None:
            path = self._paths[file] = self.root / file
        return path


def pair_files(name: str, split: Split, root: Path, files: Sequence[str] | None = None) -> PairedFiles:
    """Pair files of a folder: see `ImageNames.pair`.

    Args:
        name: Name of the layout.
        split: Split to look for.
        root: Folder of the data set.
        files: Paths of the images, relative to ``root``, with ``/``; listed by default.

    Raises:
        DerainError: If the folder does not exist.
    """
    return ImageNames(root, files).pair(name, split)


def _prefixes(split: Split) -> list[str]:
    """Return the patterns that may precede those of a split: its folder, and nothing."""
    return [f"(?:{SPLIT_FOLDERS[split]})/", ""] if split in SPLIT_FOLDERS else [""]


def _with_later_variants(chosen: PairedFiles, later: Sequence[PairedFiles]) -> PairedFiles:
    """Add to a variant's result its clashes with later variants, and the numbers of pairs that only these match."""
    clean_files = {rainy: clean for _, rainy, clean in chosen.pairs}
    clashes = list(chosen.clashes)
    unused = []
    for paired in later:
        if paired.clashes:  # this variant does not fit well enough to contradict the chosen one
            continue
        unused_pairs = 0
        for _, rainy, clean in paired.pairs:
            if rainy not in clean_files:
                unused_pairs += 1
                continue
            expected = clean_files[rainy]
            if expected is not None and clean is not None and expected != clean:
                clashes.append((expected, clean))
        if unused_pairs:
            unused.append((paired.variant, unused_pairs))
    return replace(chosen, clashes=tuple(dict.fromkeys(clashes)), unused=tuple(unused))


def _pair_by_key(
    rainy: Sequence[_KeyedFile], clean: Sequence[_KeyedFile]
) -> tuple[list[tuple[str, str | None]], list[str], list[tuple[str, str]]]:
    """Return pairs of files with equal keys, files without partner, and clashes of two files for the same key."""
    pairs: list[tuple[str, str | None]] = []
    unpaired: list[str] = []
    clashes: list[tuple[str, str]] = []
    clean_by_key: dict[Key, str] = {}
    for key, _, file in clean:
        first = clean_by_key.setdefault(key, file)
        if first != file:
            clashes.append((first, file))
    clean_files = set(clean_by_key.values())
    rainy_by_key: dict[tuple[Key, str | None], str] = {}
    paired_keys = set()
    for key, rain_version, file in rainy:
        if file in clean_files:  # the rainy pattern may match clean files too
            continue
        first = rainy_by_key.setdefault((key, rain_version), file)
        if first != file:
            clashes.append((first, file))
        elif key not in clean_by_key:
            unpaired.append(file)
        else:
            pairs.append((file, clean_by_key[key]))
            paired_keys.add(key)
    unpaired += [file for key, file in clean_by_key.items() if key not in paired_keys]
    return pairs, unpaired, clashes


def _composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _unique_names(files: Sequence[str]) -> list[str]:
    """Return the shortest names that differ on any file system: stems, else paths without suffix, else paths."""
    stems = [PurePosixPath(file).stem for file in files]
    paths = [file.rpartition(".")[0] for file in files]
    for names in (stems, paths):
        if len({canonical_name(name) for name in names}) == len(names):
            return names
    return list(files)


def _frame_names(files: Sequence[str]) -> list[str]:
    """Return the names ``SEQUENCE/FRAME`` of frames.

    A sequence has the name of its folder, or the path of its folder if several folders have the same name.
    """
    paths = [PurePosixPath(file) for file in files]
    folders = list(dict.fromkeys(path.parent for path in paths))
    repeated = len({canonical_name(folder.name) for folder in folders}) < len(folders)
    return [f"{path.parent if repeated else path.parent.name}/{path.stem}" for path in paths]


def canonical_name(name: str) -> str:
    """Normalise a name (NFC, case-folded); names that some file system treats as equal become equal.

    Example:
        >>> canonical_name("Cafe\u0301") == canonical_name("caf\u00e9")
        True
    """
    return unicodedata.normalize("NFC", name).casefold()


def find_data_set_folders(name: str, data_root: Path) -> list[Path]:
    """Return the folders that are named after a data set, sorted by depth.

    The data root and its subfolders are searched, down to three levels below it and without hidden folders. Of several
    links to one folder, only the first is returned.

    Args:
        name: Name of the data set.
        data_root: Folder to search.

    Raises:
        DerainError: If the data root is not a folder.
    """
    if not data_root.is_dir():
        raise DerainError(f"{data_root}: no such folder; give the folder that contains the data sets")
    candidates = []
    for folder in (data_root, *_subfolders(data_root, _MAX_DEPTH)):
        alias = folder_alias_index(folder, name)
        if alias is not None:
            candidates.append((len(folder.parts), alias, folder))
    first_by_target: dict[Path, Path] = {}
    for _, _, folder in sorted(candidates):
        first_by_target.setdefault(folder.resolve(), folder)
    return list(first_by_target.values())


def folder_alias_index(folder: Path, name: str) -> int | None:
    """Return the index in ``Layout.folders`` of the first name that matches a folder; None if none does.

    A name matches the end of the folder's path, or of the path of its link target. Case is ignored.
    """
    paths = [[part.lower() for part in path.parts] for path in (folder.absolute(), folder.resolve())]
    for index, alias in enumerate(LAYOUTS[name].folders):
        tail = alias.lower().split("/")
        if any(parts[-len(tail) :] == tail for parts in paths):
            return index
    return None


def _subfolders(root: Path, depth: int) -> Iterator[Path]:
    with os.scandir(root) as entries:
        folders = sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for folder in folders:
        yield folder
        if depth > 1:
            yield from _subfolders(folder, depth - 1)


def describe_contents(folder: Path) -> str:
    """Return the contents of a folder as text, such as ``100 images; folders: clean, rainy``."""
    folders = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=natural_key)
    images = len(list_images(folder).files)
    parts = []
    if images:
        parts.append("1 image" if images == 1 else f"{images} images")
    if folders:
        parts.append("folders: " + ", ".join(folders[:6]) + (" …" if len(folders) > 6 else ""))
    return "; ".join(parts) or "neither folders nor images"
