"""Which files of a folder belong together: keys, variants of a layout, folders of sets. Reads no image."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from derain.data.layouts import AUXILIARY, LAYOUTS, SPLIT_FOLDERS, Files, Split
from derain.errors import DerainError
from derain.images import image_files, list_images, natural_key

_GROUPS = {"{n}": r"(?P<n>\d+)", "{name}": "(?P<name>.+?)", "{streak}": r"(?P<streak>\d+)"}
_DEPTH = 3  # folders below the data root in which a set is looked for


@dataclass(frozen=True)
class PairedFiles:
    """What a layout makes of the files of a split.

    Attributes:
        pairs: Name, rainy file and clean file of each pair, in natural order of the names.
        unpaired: Files that the layout knows and that lack their partner.
        clashes: Two files each of which only one can be in a pair: a key occurs twice, or a rainy image has one
            clean image by this variant and another one by a later variant of the layout.
        variant: How the files lie.
        unused: Later variants by which other files are pairs, with the number of those pairs.
    """

    pairs: tuple[tuple[str, Path, Path | None], ...] = ()
    unpaired: tuple[Path, ...] = ()
    clashes: tuple[tuple[Path, Path], ...] = ()
    variant: Files = field(default_factory=lambda: Files(""))
    unused: tuple[tuple[Files, int], ...] = ()


def list_relative(root: Path, *, warn: bool = True) -> list[str]:
    """Image files below a folder, ``/`` between folders, in natural order.

    Args:
        root: The folder.
        warn: Warn of images that are skipped.

    Raises:
        DerainError: If there is no such folder.
    """
    if not root.is_dir():
        raise DerainError(f"{root}: no such folder; give a data set's name or its folder")
    files = image_files(root, recursive=True) if warn else list_images(root, recursive=True).files
    return [path.relative_to(root).as_posix() for path in files]


def pair_files(name: str, split: Split, root: Path, files: Sequence[str] | None = None) -> PairedFiles:
    """Pair files by the first variant of a layout that fits; none does if there are no pairs.

    Args:
        name: A layout.
        split: For ``predict``, a layout without such files gives the rainy images of its test split.
        root: The set's folder.
        files: Image files below it, ``/`` between folders; listed if not given.
    """
    files = list_relative(root) if files is None else files
    variants = LAYOUTS[name].files
    source: Split = "test" if split == "predict" and "predict" not in variants else split
    prefixes = [f"(?:{SPLIT_FOLDERS[source]})/", ""] if source in SPLIT_FOLDERS else [""]
    fits = []
    for variant in variants.get(source, ()):
        tries = (_match(variant, prefix, root, files) for prefix in prefixes)
        fits += [matched for matched in tries if matched.pairs][:1]
    if not fits:
        return PairedFiles()
    matched = _compared(fits[0], fits[1:])
    if split == "predict":
        return replace(matched, pairs=tuple((name, rainy, None) for name, rainy, _ in matched.pairs))
    return matched


def _compared(chosen: PairedFiles, others: Sequence[PairedFiles]) -> PairedFiles:
    """Add what the later variants make of the files: other clean images, and pairs of other files."""
    clean = {rainy: partner for _, rainy, partner in chosen.pairs}
    clashes = list(chosen.clashes)
    unused = []
    for other in others:
        if other.clashes:  # it does not fit well enough to contradict
            continue
        partners = [(clean[rainy], partner) for _, rainy, partner in other.pairs if rainy in clean]
        clashes += [(one, two) for one, two in partners if one is not None and two is not None and one != two]
        further = sum(rainy not in clean for _, rainy, _ in other.pairs)
        if further:
            unused.append((other.variant, further))
    return replace(chosen, clashes=tuple(dict.fromkeys(clashes)), unused=tuple(unused))


def _match(variant: Files, prefix: str, root: Path, files: Sequence[str]) -> PairedFiles:
    rainy = _keyed(prefix + variant.rainy, variant.numbers, files, auxiliary=variant.auxiliary)
    unpaired, clashes = [], []
    matched: list[tuple[str, str | None]] = []
    if variant.clean is None:
        has_clean = variant.clean_side is not None and variant.truth
        matched = [(file, file if has_clean else None) for _, _, file in rainy]
    else:
        clean: dict[tuple[str | int, ...], str] = {}
        for key, _, file in _keyed(prefix + variant.clean, variant.numbers, files):
            first = clean.setdefault(key, file)
            if first != file:
                clashes.append((first, file))
        clean_files = set(clean.values())  # the rainy pattern may fit them as well
        taken: dict[tuple[object, ...], str] = {}
        used = set()
        for key, streak, file in rainy:
            if file in clean_files:
                continue
            first = taken.setdefault((key, streak), file)
            if first != file:
                clashes.append((first, file))
            elif key not in clean:
                unpaired.append(file)
            else:
                matched.append((file, clean[key]))
                used.add(key)
        unpaired += [file for key, file in clean.items() if key not in used]
    pairs = [
        (name, root / file, None if partner is None else root / partner)
        for name, (file, partner) in zip(_names([file for file, _ in matched]), matched, strict=True)
    ]
    return PairedFiles(
        tuple(sorted(pairs, key=lambda pair: natural_key(pair[0]))),
        tuple(root / file for file in sorted(unpaired, key=natural_key)),
        tuple((root / first, root / second) for first, second in clashes),
        variant,
    )


def _keyed(
    pattern: str, numbers: tuple[int, int] | None, files: Iterable[str], *, auxiliary: bool = False
) -> list[tuple[tuple[str | int, ...], str | None, str]]:
    """Return key, streak and path of every file that a pattern fits; names in Unicode's composed form (NFC).

    Args:
        pattern: What :class:`Files` describes.
        numbers: First and last ``{n}``.
        files: Paths, ``/`` between folders.
        auxiliary: Whether files named as rain masks and streaks count.
    """
    for short, group in _GROUPS.items():
        pattern = pattern.replace(short, group)
    fits, masks = re.compile(pattern, re.IGNORECASE), re.compile(AUXILIARY, re.IGNORECASE)
    found = []
    for file in files:
        stem = unicodedata.normalize("NFC", file.rpartition(".")[0])
        fit = fits.fullmatch(stem)
        if fit is None or (not auxiliary and masks.fullmatch(stem)):
            continue
        groups = fit.groupdict()
        if numbers and not numbers[0] <= int(groups["n"]) <= numbers[1]:
            continue
        streak = groups.pop("streak", None)
        key = tuple(int(groups[name]) if name == "n" else groups[name].lower() for name in sorted(groups))
        found.append((key, streak, file))
    return found


def _names(files: Sequence[str]) -> list[str]:
    """Return the shortest names that differ on any file system: stems, else paths without ending, else paths."""
    stems = [Path(file).stem for file in files]
    paths = [file.rpartition(".")[0] for file in files]
    return next((names for names in (stems, paths) if len({*map(canonical_name, names)}) == len(names)), list(files))


def canonical_name(name: str) -> str:
    """Return what a name has in common with those that some file systems take for the same one.

    Example:
        >>> canonical_name("Cafe\u0301") == canonical_name("caf\u00e9")
        True
    """
    return unicodedata.normalize("NFC", name).casefold()


def find_set_folders(name: str, data_root: Path) -> list[Path]:
    """Return the folders below the data root, or the root itself, that have a set's name; the nearest first.

    Of links to one folder only the nearest counts.

    Raises:
        DerainError: If the data root is no folder.
    """
    if not data_root.is_dir():
        raise DerainError(f"{data_root}: no such folder; give the folder that holds the data sets")
    found = []
    for folder in (data_root, *_subfolders(data_root, _DEPTH)):
        rank = folder_alias_index(folder, name)
        if rank is not None:
            found.append((len(folder.parts), rank, folder))
    nearest: dict[Path, Path] = {}
    for *_, folder in sorted(found):
        nearest.setdefault(folder.resolve(), folder)
    return list(nearest.values())


def folder_alias_index(folder: Path, name: str) -> int | None:
    """Return which of a set's folder names a folder, or what it links to, has in any case; None if none."""
    paths = [[part.lower() for part in path.parts] for path in (folder.absolute(), folder.resolve())]
    tails = [tail.lower().split("/") for tail in LAYOUTS[name].folders]
    ranks = (rank for rank, tail in enumerate(tails) if any(parts[-len(tail) :] == tail for parts in paths))
    return next(ranks, None)


def _subfolders(root: Path, depth: int) -> Iterator[Path]:
    with os.scandir(root) as entries:
        folders = sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for folder in folders:
        yield folder
        if depth > 1:
            yield from _subfolders(folder, depth - 1)


def inventory(folder: Path) -> str:
    """What a folder holds, in words: ``folders rainy and 100 images``."""
    folders = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=natural_key)
    images = len(list_images(folder).files)
    listed = "folders " + ", ".join(folders[:6]) + (" …" if len(folders) > 6 else "")
    held = [listed] * bool(folders) + [f"{images} images"] * bool(images)
    return " and ".join(held) or "neither folders nor images"
