"""Find the data sets in a folder."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from derain.data.layouts import LAYOUTS, SPLIT_FOLDERS, Split
from derain.data.name_matching import (
    ImageNames,
    PairedFiles,
    describe_contents,
    find_data_set_folders,
    list_relative,
    pair_files,
)
from derain.data.pairs import detect_layout
from derain.data.shards import read_split, sharded_splits
from derain.errors import DerainError
from derain.image_sources import ImageFile


@dataclass(frozen=True, eq=False)
class DataSplit:
    """One split of a data set on disk.

    Attributes:
        name: Name of the data set if its folder was found by this name, or if it is in shards; else name of the folder.
        split: ``train``, ``test`` or ``predict``.
        layout: Key of :data:`derain.data.layouts.LAYOUTS`.
        root: Folder of the data set or of its shards.
        files: Paired files of the split.
    """

    name: str
    split: Split
    layout: str
    root: Path
    files: PairedFiles

    def __str__(self) -> str:
        """Return data set and split."""
        return f"{self.name} {self.split}"

    @property
    def rainy_files(self) -> frozenset[ImageFile]:
        """Rainy files of the split."""
        return frozenset(rainy for _, rainy, _ in self.files.pairs)


def find_sets(root: Path, layout: str | None = None) -> list[DataSplit]:
    """Return all splits of the data sets in a folder, without warnings about skipped images.

    Args:
        root: Folder of one data set or of several, or folder of shards.
        layout: Name of the layout of ``root``; detected by default.

    Raises:
        DerainError: If the folder does not exist or contains no data set, the layout is unknown or ambiguous, shards
            cannot be read, or ``layout`` is given for shards.
    """
    sharded = sharded_splits(root)
    if sharded:
        if layout is not None:
            raise DerainError(f"--layout {layout}: {root} contains shards, whose index has the layout; omit the option")
        return [_find_in_shards(root, split) for split in sharded]
    files = list_relative(root, warn=False)
    if layout is None:
        by_name = _find_by_folder_name(root, files)
        return by_name or _find_splits(root.resolve().name, _detect_any_split(root, files), root, files)
    if layout not in LAYOUTS:
        raise DerainError(f"--layout {layout}: unknown layout; choose from {', '.join(LAYOUTS)}")
    splits = _find_splits(root.resolve().name, layout, root, files)
    if not splits:
        expected = " or ".join(str(variants[0]) for variants in LAYOUTS[layout].files.values())
        raise DerainError(f"{root}: no {layout} pairs; contains {describe_contents(root)}; expected {expected}")
    return splits


def find_lone_sides(root: Path, found: Sequence[DataSplit]) -> Iterator[tuple[str, list[Path]]]:
    """Find splits that have files but no pairs, such as rainy files alone, in folders named after a data set.

    Args:
        root: Folder of one data set or of several.
        found: Splits that `find_sets` returned for this folder.

    Yields:
        Data set and split, such as ``Rain800 train``, and the files without partner.
    """
    if sharded_splits(root):
        return
    known_files: set[ImageFile | None] = set()
    for data_split in found:
        if data_split.layout == "images":  # any folder of photos has this layout
            continue
        for _, rainy, clean in data_split.files.pairs:
            known_files |= {rainy, clean}
    for name, layout in LAYOUTS.items():
        if layout.excluded_test_set is not None:  # the full set has the same files
            continue
        for folder in find_data_set_folders(name, root):
            images = ImageNames(folder, list_relative(folder, warn=False))
            for split in layout.files:
                files = [file for file in images.matching_files(name, split) if file not in known_files]
                if files and not images.pair(name, split).pairs:
                    known_files.update(files)
                    yield f"{name} {split}", files


def _find_in_shards(root: Path, split: Split) -> DataSplit:
    found = read_split(str(root), split)
    return DataSplit(found.name, split, found.layout, root, found.files)


def _find_by_folder_name(root: Path, files: Sequence[str]) -> list[DataSplit]:
    """Return the splits of all data sets after which ``root`` or a folder in it is named.

    Outer folders are searched first; of equally deep folders, that of the first data set in ``LAYOUTS``. A split that
    shares a rainy file with one found before is omitted. The result has the order of ``LAYOUTS``.
    """
    names = list(LAYOUTS)
    candidates = []
    for index, (name, layout) in enumerate(LAYOUTS.items()):
        if layout.excluded_test_set is not None:  # the full set has the same files
            continue
        candidates += [(len(folder.parts), index, folder, name) for folder in find_data_set_folders(name, root)]
    candidates.sort(key=lambda candidate: candidate[:2])
    found: list[DataSplit] = []
    assigned: set[ImageFile] = set()
    for _, _, folder, name in candidates:
        own_files = _files_below(folder.relative_to(root), files)
        own_files = own_files or list_relative(folder, warn=False)  # a link to a folder that is listed elsewhere
        data_splits = _find_splits(name, name, folder, own_files)
        new_splits = [data_split for data_split in data_splits if not assigned & data_split.rainy_files]
        found += new_splits
        for data_split in new_splits:
            assigned |= data_split.rainy_files
    return sorted(found, key=lambda data_split: names.index(data_split.layout))


def _files_below(folder: Path, files: Sequence[str]) -> list[str]:
    """Return the files in a folder, relative to it."""
    prefix = "" if folder == Path() else f"{folder.as_posix()}/"
    return [file.removeprefix(prefix) for file in files if file.startswith(prefix)]


def _detect_any_split(root: Path, files: Sequence[str]) -> str:
    """Return the layout of the first split (train, test or predict) of which a folder has pairs.

    Raises:
        DerainError: If no layout fits.
    """
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        with suppress(DerainError):
            return detect_layout(root, split, files)[0]
    return detect_layout(root, "predict", files)[0]


def _find_splits(name: str, layout: str, root: Path, files: Sequence[str]) -> list[DataSplit]:
    """Return the splits of one data set; of several splits with the same rainy files, the most likely one."""
    found: dict[frozenset[ImageFile], DataSplit] = {}
    for split in LAYOUTS[layout].files:
        data_split = DataSplit(name, split, layout, root, pair_files(layout, split, root, files))
        if not data_split.files.pairs:
            continue
        previous = found.setdefault(data_split.rainy_files, data_split)
        if _likelihood(data_split) > _likelihood(previous):
            found[data_split.rainy_files] = data_split
    return list(found.values())


def _likelihood(data_split: DataSplit) -> tuple[bool, bool]:
    """Return whether the number of pairs is that of the layout, and whether the folder is named after the split."""
    pattern = SPLIT_FOLDERS.get(data_split.split, "predict")
    has_name = re.match(pattern, data_split.root.resolve().name, re.IGNORECASE) is not None
    expected = LAYOUTS[data_split.layout].counts.get(data_split.split)
    return len(data_split.files.pairs) == expected, has_name
