"""Which data sets lie below a folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from derain.data.layouts import LAYOUTS, Split
from derain.data.matching import Matched, bears_name, inventory, listing, match, set_folders
from derain.data.pairs import detect
from derain.errors import DerainError


@dataclass(frozen=True, eq=False)
class FoundSet:
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
    matched: Matched

    def __str__(self) -> str:
        """Set and split."""
        return f"{self.name} {self.split}"


def find_sets(root: Path, layout: str | None = None) -> list[FoundSet]:
    """Finds all splits of all sets below a folder, or of the set that it is.

    Args:
        root: A set's folder, or a folder that holds several.
        layout: The layout of ``root``, if it shall not be detected.

    Raises:
        DerainError: If there is no set.
    """
    files = listing(root)
    if layout is not None:
        if layout not in LAYOUTS:
            raise DerainError(f"--layout {layout}: no such layout; known are {', '.join(LAYOUTS)}")
        found = _splits(root.resolve().name, layout, root, files)
        if not found:
            wanted = " or ".join(str(variants[0]) for variants in LAYOUTS[layout].files.values())
            raise DerainError(f"{root}: no {layout} pairs, it holds {inventory(root)}; expected {wanted}")
        return found
    return _by_name(root, files) or _by_files(root, files)


def _by_name(root: Path, files: Sequence[str]) -> list[FoundSet]:
    """Sets whose folders bear their names; files that two could claim belong to the first."""
    found: list[FoundSet] = []
    claimed: set[Path] = set()
    for name, layout in LAYOUTS.items():
        if layout.without is not None or not layout.folders:  # strict sets have the files of another
            continue
        for folder in set_folders(name, root):
            inside = [
                Path(file).relative_to(folder.relative_to(root)).as_posix() for file in _below(folder, root, files)
            ]
            splits = [one for one in _splits(name, name, folder, inside) if not claimed & _rainy(one)]
            found += splits
            claimed.update(*(_rainy(one) for one in splits))
            if splits and bears_name(root, name) is not None:
                return splits
            if splits:
                break
    return found


def _below(folder: Path, root: Path, files: Sequence[str]) -> Iterator[str]:
    prefix = folder.relative_to(root).as_posix()
    return (file for file in files if prefix == "." or file.startswith(f"{prefix}/"))


def _rainy(one: FoundSet) -> frozenset[Path]:
    return frozenset(rainy for _, rainy, _ in one.matched.pairs)


def _by_files(root: Path, files: Sequence[str]) -> list[FoundSet]:
    """The set that the files make the folder out to be."""
    splits: tuple[Split, ...] = ("train", "test", "predict")
    for split in splits:
        try:
            name, _, _ = detect(root, split, files)
        except DerainError:
            if split == "predict":
                raise
        else:
            return _splits(root.resolve().name, name, root, files)
    return []


def _splits(name: str, layout: str, root: Path, files: Sequence[str]) -> list[FoundSet]:
    """The splits of one set; of two that consist of the same files the one with the published count."""
    counts = LAYOUTS[layout].counts
    best: dict[frozenset[Path], FoundSet] = {}
    for split in LAYOUTS[layout].files:
        one = FoundSet(name, split, layout, root, match(layout, split, root, files))
        if one.matched.pairs:
            other = best.setdefault(_rainy(one), one)
            if _off(one, counts.get(split)) < _off(other, counts.get(other.split)):
                best[_rainy(one)] = one
    return list(best.values())


def _off(one: FoundSet, expected: int | None) -> int:
    return 0 if expected is None else abs(expected - len(one.matched.pairs))
