"""Which files of a folder belong together: keys, variants of a layout, folders of sets."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from derain.data.layouts import AUXILIARY, LAYOUTS, SPLIT_FOLDERS, Files, Side, Split
from derain.errors import DerainError
from derain.images import image_files, natural_key

_GROUPS = {"{n}": r"(?P<n>\d+)", "{name}": "(?P<name>.+?)", "{streak}": r"(?P<streak>\d+)"}
_DEPTH = 3  # folders below the data root in which a set is looked for


@dataclass(frozen=True)
class Matched:
    """What a layout makes of the files of a split.

    Attributes:
        pairs: In natural order of their names.
        unpaired: Files that the layout knows and that lack their partner.
        clashes: Two files each that claim the same place in a pair.
        notes: What a user must know of this version of the set.
        variant: Where the files lie.
    """

    pairs: tuple[Pair, ...]
    unpaired: tuple[Path, ...] = ()
    clashes: tuple[tuple[Path, Path], ...] = ()
    notes: tuple[str, ...] = ()
    variant: Files | None = None


def match_split(name: str, split: Split, root: Path, files: Sequence[str] | None = None) -> Matched:
    """Pairs files by the first variant of a layout that fits.

    Args:
        name: A layout.
        split: For ``predict``, a layout without such files gives the rainy images of its test split.
        root: The set's folder.
        files: Image files below ``root``, ``/`` between folders; listed if not given.
    """
    files = listing(root) if files is None else files
    layout = LAYOUTS[name]
    source = split
    if split == "predict" and "predict" not in layout.files:
        source = "test" if "test" in layout.files else "train"
    result = Matched(())
    for variant in layout.files.get(source, ()):
        for prefix in ([f"(?:{SPLIT_FOLDERS[source]})/"] if source in SPLIT_FOLDERS else []) + [""]:
            result = _match(variant, prefix, root, files)
            if result.pairs:
                pairs = result.pairs
                if split == "predict":
                    pairs = tuple(replace(pair, clean=None) for pair in pairs)
                return replace(result, pairs=pairs)
    return result


def _match(variant: Files, prefix: str, root: Path, files: Sequence[str]) -> Matched:
    rainy = _keyed(prefix + variant.rainy, variant.numbers, files)
    notes = (variant.note,) if variant.note else ()
    if variant.clean is None:
        names = _names([file for _, _, file in rainy])
        two = variant.clean_side is not None and variant.truth
        paths = [root / file for _, _, file in rainy]
        pairs = [
            Pair(name, path, path if two else None, variant.clean_side)
            for name, path in zip(names, paths, strict=True)
        ]
        return Matched(_sorted(pairs), notes=notes, variant=variant)
    clean: dict[tuple[str | int, ...], str] = {}
    taken: dict[tuple[object, ...], str] = {}
    clashes, unpaired, matched = [], [], []
    for key, _, file in _keyed(prefix + variant.clean, variant.numbers, files):
        first = clean.setdefault(key, file)
        if first != file:
            clashes.append((root / first, root / file))
    for key, streak, file in rainy:
        first = taken.setdefault((key, streak), file)
        if first != file:
            clashes.append((root / first, root / file))
        elif clean.get(key, file) == file:
            unpaired.append(root / file)
        else:
            matched.append((file, clean[key]))
    used = {file for _, file in matched}
    unpaired += [root / file for file in clean.values() if file not in used and root / file not in unpaired]
    names = _names([file for file, _ in matched])
    pairs = [Pair(name, root / a, root / b) for name, (a, b) in zip(names, matched, strict=True)]
    return Matched(_sorted(pairs), tuple(unpaired), tuple(clashes), notes, variant)


def _keyed(
    pattern: str, numbers: tuple[int, int] | None, files: Iterable[str]
) -> list[tuple[tuple[str | int, ...], str | None, str]]:
    """Key, streak and file of every file that a pattern fits."""
    for short, group in _GROUPS.items():
        pattern = pattern.replace(short, group)
    compiled = re.compile(pattern, re.IGNORECASE)
    auxiliary = re.compile(AUXILIARY, re.IGNORECASE)
    found = []
    for file in files:
        stem = file.rpartition(".")[0]
        match = compiled.fullmatch(stem)
        if match is None or auxiliary.fullmatch(stem):
            continue
        groups = match.groupdict()
        streak = groups.pop("streak", None)
        if numbers and not numbers[0] <= int(groups["n"]) <= numbers[1]:
            continue
        key = tuple(int(groups[name]) if name == "n" else groups[name].lower() for name in sorted(groups))
        found.append((key, streak, file))
    return found


def _names(files: Sequence[str]) -> list[str]:
    """Shortest names that tell files apart: stems, else paths without ending, else paths."""
    stems = [Path(file).stem for file in files]
    paths = [file.rpartition(".")[0] for file in files]
    return next((names for names in (stems, paths) if len(set(names)) == len(names)), list(files))


def _sorted(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    return tuple(sorted(pairs, key=lambda pair: natural_key(pair.name)))


def listing(root: Path) -> list[str]:
    """Image files below a folder, ``/`` between folders, in natural order.

    Raises:
        DerainError: If there is no such folder.
    """
    if not root.is_dir():
        raise DerainError(f"{root}: no such folder; give a data set's name or its folder")
    return [path.relative_to(root).as_posix() for path in image_files(root, recursive=True)]


def set_folders(name: str, data_root: Path) -> list[Path]:
    """Folders below the data root, or the root itself, that go by a set's name; the nearest first.

    Raises:
        DerainError: If the data root is no folder.
    """
    if not data_root.is_dir():
        raise DerainError(f"{data_root}: no such folder; give the folder that holds the data sets")
    root = data_root.resolve()
    found: list[tuple[int, int, str, Path]] = []
    for folder in (root, *_subfolders(root, _DEPTH)):
        rank = _named_like(folder, name)
        if rank is not None:
            below = folder.relative_to(root)
            found.append((len(below.parts), rank, below.as_posix(), data_root / below))
    return [folder for *_, folder in sorted(found)]


def _subfolders(root: Path, depth: int) -> Iterable[Path]:
    with os.scandir(root) as entries:
        folders = [Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    for folder in folders:
        yield folder
        if depth > 1:
            yield from _subfolders(folder, depth - 1)


def _named_like(folder: Path, name: str) -> int | None:
    """Which of a set's folder names a folder bears."""
    parts = tuple(part.lower() for part in folder.parts)
    tails = [tuple(tail.lower().split("/")) for tail in LAYOUTS[name].folders]
    return next((rank for rank, tail in enumerate(tails) if parts[-len(tail) :] == tail), None)


def inventory(folder: Path) -> str:
    """What a folder holds, in words."""
    folders = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=natural_key)
    images = len(image_files(folder))
    listed = ", ".join(folders[:6]) + (" …" if len(folders) > 6 else "")
    return (
        " and ".join(
            part
            for part in (f"folders {listed}" if folders else "", f"{images} images" if images else "")
            if part
        )
        or "neither folders nor images"
    )


