"""Which data sets lie below a folder."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from derain.data.layouts import LAYOUTS, SPLIT_FOLDERS, Split
from derain.data.name_matching import PairedFiles, find_set_folders, inventory, list_relative, pair_files
from derain.data.pairs import detect_layout
from derain.errors import DerainError


@dataclass(frozen=True, eq=False)
class DataSplit:
    """A split of a set that lies somewhere.

    Attributes:
        name: Set, or folder where its layout is a general one.
        split: Which split.
        layout: Its layout.
        root: The set's folder.
        matched: Its files.
    """

    name: str
    split: Split
    layout: str
    root: Path
    matched: PairedFiles

    def __str__(self) -> str:
        """Set and split."""
        return f"{self.name} {self.split}"


def find_sets(root: Path, layout: str | None = None) -> list[DataSplit]:
    """Finds all splits of all sets below a folder, or of the set that it is, without a warning of skipped images.

    Args:
        root: A set's folder, or a folder that holds several.
        layout: The layout of ``root``, if it shall not be detected.

    Raises:
        DerainError: If there is no set.
    """
    files = list_relative(root, warn=False)
    if layout is not None:
        if layout not in LAYOUTS:
            raise DerainError(f"--layout {layout}: no such layout; known are {', '.join(LAYOUTS)}")
        found = _splits(root.resolve().name, layout, root, files)
        if not found:
            wanted = " or ".join(str(variants[0]) for variants in LAYOUTS[layout].files.values())
            raise DerainError(f"{root}: no {layout} pairs, it holds {inventory(root)}; expected {wanted}")
        return found
    return _by_name(root, files) or _by_files(root, files)


def _by_name(root: Path, files: Sequence[str]) -> list[DataSplit]:
    """Sets whose folders bear their names; files that two could claim belong to the outer, then to the first."""
    candidates = [
        (len(folder.parts), place, folder, name)
        for place, (name, layout) in enumerate(LAYOUTS.items())
        if layout.without is None and layout.folders  # strict sets have the files of another
        for folder in find_set_folders(name, root)
    ]
    found: list[DataSplit] = []
    claimed: set[Path] = set()
    for _, _, folder, name in sorted(candidates, key=lambda one: one[:2]):
        below = folder.relative_to(root)
        inside = [Path(file).relative_to(below).as_posix() for file in _below(below, files)]
        inside = inside or list_relative(folder, warn=False)  # a link to a folder that is listed by its own path
        splits = [one for one in _splits(name, name, folder, inside) if not claimed & _rainy(one)]
        found += splits
        claimed.update(*(_rainy(one) for one in splits))
    names = list(LAYOUTS)
    return sorted(found, key=lambda one: names.index(one.layout))


def _below(folder: Path, files: Sequence[str]) -> Iterator[str]:
    prefix = "" if folder == Path() else f"{folder.as_posix()}/"
    return (file for file in files if file.startswith(prefix))


def _rainy(one: DataSplit) -> frozenset[Path]:
    return frozenset(rainy for _, rainy, _ in one.matched.pairs)


def _by_files(root: Path, files: Sequence[str]) -> list[DataSplit]:
    """The set that the files make the folder out to be."""
    splits: tuple[Split, ...] = ("train", "test", "predict")
    for split in splits:
        try:
            name, _, _ = detect_layout(root, split, files)
        except DerainError:
            if split == "predict":
                raise
        else:
            return _splits(root.resolve().name, name, root, files)
    return []


def _splits(name: str, layout: str, root: Path, files: Sequence[str]) -> list[DataSplit]:
    """The splits of one set; of several that consist of the same files the likeliest."""
    best: dict[frozenset[Path], DataSplit] = {}
    for split in LAYOUTS[layout].files:
        one = DataSplit(name, split, layout, root, pair_files(layout, split, root, files))
        if one.matched.pairs:
            other = best.setdefault(_rainy(one), one)
            best[_rainy(one)] = max(other, one, key=_likelihood)
    return list(best.values())


def _likelihood(one: DataSplit) -> tuple[bool, bool]:
    """Whether a split has the published count, and whether the folder is named after it."""
    folders = SPLIT_FOLDERS.get(one.split, "predict")
    named = re.match(folders, one.root.resolve().name, re.IGNORECASE) is not None
    return len(one.matched.pairs) == LAYOUTS[one.layout].counts.get(one.split), named
