"""Pairs of rainy and clean images: found by key, read from files."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from derain.data import backgrounds
from derain.data.file_hashes import cached_numbers
from derain.data.layouts import LAYOUTS, Side, Split
from derain.data.name_matching import (
    PairedFiles,
    find_set_folders,
    folder_alias_index,
    inventory,
    list_relative,
    pair_files,
)
from derain.errors import DerainError
from derain.images import Pixels, read_rgb
from derain.progress import track


@dataclass(frozen=True)
class Pair:
    """A rainy image and, where there is one, its clean image.

    Attributes:
        name: Name of the rainy file without ending, unique within its set; results are written under it.
        rainy: File of the rainy image.
        clean: File of the clean image; the same file where both lie side by side.
        clean_side: Which half of the file is clean, where both lie side by side.
    """

    name: str
    rainy: Path
    clean: Path | None = None
    clean_side: Side | None = None

    def read(self) -> tuple[Pixels, Pixels | None]:
        """Reads both images.

        Returns:
            Rainy and clean pixels, ``(h, w, 3)`` in 0 to 255 each; ``None`` where there is no clean image.

        Raises:
            DerainError: If a file cannot be read, or the two differ in size.
        """
        rainy = read_rgb(self.rainy)
        if self.clean_side is not None:
            left, right = split_halves(rainy)
            rainy, clean = (right, left) if self.clean_side == "left" else (left, right)
            return rainy, clean if self.clean is not None else None
        if self.clean is None:
            return rainy, None
        clean = read_rgb(self.clean)
        if rainy.shape != clean.shape:
            sizes = " and ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (rainy, clean))
            raise DerainError(
                f"{self.rainy}: rainy and clean image must be of one size, got {sizes} ({self.clean}); "
                "remove or replace the pair"
            )
        return rainy, clean


@dataclass(frozen=True)
class PairSet:
    """The pairs of one split of a set.

    Attributes:
        name: The set's name, or the folder's.
        layout: Which layout of :data:`derain.data.layouts.LAYOUTS` the pairs were found by.
        split: ``train``, ``test`` or ``predict``.
        root: The set's folder.
        pairs: In natural order of their names.
        notes: What a user should know: how the layout was detected, what is missing or left out.
    """

    name: str
    layout: str
    split: Split
    root: Path
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()


def split_halves(image: Pixels) -> tuple[Pixels, Pixels]:
    """Cuts side-by-side pixels ``(h, 2w, 3)`` in two; of an odd width the middle column is dropped.

    Raises:
        DerainError: If the image is one pixel wide.
    """
    half = image.shape[1] // 2
    if half == 0:
        raise DerainError("an image one pixel wide has no two halves; expected rainy and clean side by side")
    return np.ascontiguousarray(image[:, :half]), np.ascontiguousarray(image[:, -half:])


def find_pairs(spec: str | Path, split: Split, *, data_root: Path | None = None) -> PairSet:
    """Finds the pairs of a split.

    Args:
        spec: A set's name (``Rain100L``, looked up below ``data_root``), a folder (its layout is detected,
            and said in the notes), or both (``Rain800:path/to/folder``).
        split: ``train``, ``test``, or ``predict``, which gives rainy images only.
        data_root: Folder that holds the sets; by default what the environment variable DERAIN_DATA names.

    Raises:
        DerainError: If the set or folder is absent, of unknown or ambiguous layout, or lacks the split.

    Example:
        >>> find_pairs("Rain100L", "train")
        Traceback (most recent call last):
        derain.errors.DerainError: Rain100L has no train split, only test; see RainTrainL
    """
    if data_root is None and os.environ.get("DERAIN_DATA"):
        data_root = Path(os.environ["DERAIN_DATA"])
    name, folder = _parse(spec)
    if folder is not None and not folder.exists() and data_root is not None and (data_root / folder).exists():
        folder = data_root / folder
    notes = []
    if name is not None:
        root, matched = _named(name, split, folder, data_root)
    else:
        assert folder is not None
        root = folder
        name, reason, matched = detect_layout(root, split)
        notes.append(f"layout {name}, detected by {reason}")
    if matched.clashes:
        first, second = matched.clashes[0]
        raise DerainError(f"{second}: fits the same pair as {first}; remove or rename one of them")
    if matched.variant.note:
        notes.append(matched.variant.note)
    for variant, count in matched.unused:
        notes.append(f"not used: {count} further pairs of files {variant}; to use them, move them to their own folder")
    pairs = to_pairs(matched)
    layout = LAYOUTS[name]
    if layout.without is not None:
        kept = _without(name, pairs, data_root or root.parent)
        left_out = len(pairs) - len(kept)
        notes.append(f"{left_out} of {len(pairs)} pairs left out: their background is in {layout.without}")
        pairs = kept
    if matched.unpaired:
        notes.append(f"files without partner: {len(matched.unpaired)}, first {matched.unpaired[0]}")
    expected = layout.counts.get(split)
    if expected is not None and len(pairs) != expected:
        notes.append(f"{len(pairs)} pairs, {name} has {expected}; run: derain data verify {root}")
    return PairSet(name if folder is None else root.resolve().name, name, split, root, pairs, tuple(notes))


def to_pairs(matched: PairedFiles) -> tuple[Pair, ...]:
    """Makes pairs of files that belong together."""
    return tuple(Pair(name, rainy, clean, matched.variant.clean_side) for name, rainy, clean in matched.pairs)


def merge_pairs(found: Sequence[PairSet], *, repeats: bool = False) -> tuple[Pair, ...]:
    """Return the pairs of several sets, named ``SET/NAME``.

    Where two folders have one name, their names begin with the folders above them, as few as make the names differ.

    Args:
        found: The sets.
        repeats: Whether one set may occur several times.

    Raises:
        DerainError: If two pairs would still have one name.

    Example:
        >>> sets = [PairSet("a", "images", "predict", Path(root), (Pair("1", Path(root, "1.png")),)) for root in "xy"]
        >>> sets = [replace(one, name="photos", root=one.root / "photos") for one in sets]
        >>> [pair.name for pair in merge_pairs(sets)]
        ['x/photos/1', 'y/photos/1']
    """
    if len(found) == 1:
        return found[0].pairs
    pairs: dict[str, Pair] = {}
    joined = []
    for one in found:
        kin = {other.root.resolve() for other in found if other.name == one.name}
        name = one.name if len(kin) == 1 else _tail(one.root.resolve(), kin)
        for pair in one.pairs:
            joined.append(replace(pair, name=f"{name}/{pair.name}"))
            first = pairs.setdefault(joined[-1].name, joined[-1])
            if first is not joined[-1] and not (repeats and first == joined[-1]):
                raise DerainError(
                    f"{pair.rainy}: has the name {first.name}, as {first.rainy} has; name each set once, and rename "
                    "folders of one name"
                )
    return tuple(joined)


def _tail(root: Path, roots: Iterable[Path]) -> str:
    """Return the last parts of a folder's path, as few as no other of these folders ends in."""
    others = [other.parts for other in roots if other != root]
    count = next(n for n in range(1, len(root.parts) + 1) if all(other[-n:] != root.parts[-n:] for other in others))
    return "/".join(root.parts[-count:]).lstrip("/")


def _parse(spec: str | Path) -> tuple[str | None, Path | None]:
    """Takes apart a set's name, ``name:path``, or a path."""
    names = {name.lower(): name for name in LAYOUTS}
    if isinstance(spec, str):
        head, _, tail = spec.partition(":")
        name = names.get(head.lower())
        if name is not None and (tail or LAYOUTS[name].folders):
            return name, Path(tail).expanduser() if tail else None
    if not str(spec):
        raise DerainError(f"no data set is named; give a folder or one of {', '.join(LAYOUTS)}")
    return None, Path(spec).expanduser()


def _named(name: str, split: Split, folder: Path | None, data_root: Path | None) -> tuple[Path, PairedFiles]:
    """Folder and files of a set whose layout is given."""
    layout = LAYOUTS[name]
    if split not in layout.files and not (split == "predict" and "test" in layout.files):
        partner = f"; see {layout.partner}" if layout.partner else ""
        raise DerainError(f"{name} has no {split} split, only {' and '.join(layout.files)}{partner}")
    variants = layout.files.get(split) or layout.files["test"]
    wanted = f"expected files: {' or '.join(dict.fromkeys(str(files) for files in variants))}"
    source = f"; get it from {layout.source}" if layout.source else ""
    if folder is not None:
        roots = [folder]
    elif data_root is None or not data_root.is_dir():
        raise DerainError(
            f"{name}: no folder of data sets ({data_root or 'none named'}); let the environment variable DERAIN_DATA "
            f"name it, or give {name}:path/to/folder{source}"
        )
    else:
        roots = find_set_folders(name, data_root)
        if not roots:
            looked = " or ".join(layout.folders)
            raise DerainError(f"{name}: no folder {looked} below {data_root}{source}; {wanted}")
    found = [(root, matched) for root in roots if (matched := pair_files(name, split, root)).pairs]
    if not found:
        raise DerainError(
            f"{name}: no {split} pairs in {roots[0]}, which holds {inventory(roots[0])}; {wanted}{source}"
        )
    root, matched = found[0]
    for other, _ in found[1:]:
        if len(other.parts) == len(root.parts):
            raise DerainError(f"{name}: both {root} and {other} hold it; say which: {name}:{root}")
    return root, matched


def _without(name: str, pairs: tuple[Pair, ...], data_root: Path) -> tuple[Pair, ...]:
    """Leaves out the pairs whose background is in the test set that the layout names; the images are read once."""
    other = LAYOUTS[name].without
    assert other is not None
    try:
        test = find_pairs(other, "test", data_root=data_root).pairs
    except DerainError as error:
        raise DerainError(
            f"{name} leaves out the backgrounds of {other} and cannot without it: {error}; {name}-full takes all pairs"
        ) from error
    both = (*pairs, *test)

    def find_shared() -> list[int]:
        with ThreadPoolExecutor() as threads:
            described = threads.map(lambda pair: backgrounds.compute_signature(read_clean(pair), local=False), both)
            images = list(track(described, f"Looking in {name} for backgrounds of {other}", len(both)))
        matches = backgrounds.find_matches(images[: len(pairs)], images[len(pairs) :], crops=False)
        return sorted({match.first for match in matches})

    what = f"shared backgrounds, version {backgrounds.FORMAT}, {len(pairs)} pairs, {[pair.clean_side for pair in both]}"
    shared = set(cached_numbers(what, [pair.clean or pair.rainy for pair in both], find_shared))
    return tuple(pair for index, pair in enumerate(pairs) if index not in shared)


def read_clean(pair: Pair) -> Pixels:
    """Reads the clean image of a pair that has one, and not the rainy one if it is another file."""
    if pair.clean is not None and pair.clean_side is None:
        return read_rgb(pair.clean)
    _, clean = pair.read()
    assert clean is not None
    return clean


def detect_layout(root: Path, split: Split, files: Sequence[str] | None = None) -> tuple[str, str, PairedFiles]:
    """Finds the layout of a folder, by its name, else by the files in it.

    Args:
        root: The folder.
        split: Which pairs it shall give.
        files: Image files below it, ``/`` between folders; listed if not given.

    Returns:
        The layout's name, what spoke for it, and the files that belong together.

    Raises:
        DerainError: If no layout gives pairs, or several disagree on them.
    """
    files = list_relative(root) if files is None else files
    fits: dict[str, PairedFiles] = {}
    for name, layout in LAYOUTS.items():
        matched = pair_files(name, split, root, files)
        if not matched.pairs or name == "images":
            continue
        around = (root.absolute(), root.absolute().parent, root.resolve(), root.resolve().parent)
        named = [folder for folder in around if folder_alias_index(folder, name) is not None]
        if named:
            return name, f"the name of the folder {named[0]}", matched
        sided = matched.variant.clean_side is not None
        if layout.without is None and not (sided and (split == "predict" or not _alike(matched))):
            fits[name] = matched
    if not fits:
        if split == "predict" and files:
            return "images", "the lack of clean images", pair_files("images", split, root, files)
        expected = "; ".join(str(variant) for variant in LAYOUTS["folder"].files["test"])
        raise DerainError(
            f"{root}: no {split} pairs in it, it holds {inventory(root)}; expected {expected}; "
            "other layouts are named, as in Rain800:path (see derain data list)"
        )
    most = max(len(matched.pairs) for matched in fits.values())
    best = {name: matched for name, matched in fits.items() if len(matched.pairs) == most}
    if len({to_pairs(matched) for matched in best.values()}) > 1:
        options = " or ".join(f"{name}:{root} ({matched.variant})" for name, matched in best.items())
        raise DerainError(f"{root}: layouts that disagree on the pairs fit it; say which: {options}")
    name = "folder" if "folder" in best else next(iter(best))
    return name, f"the files ({best[name].variant})", best[name]


def _alike(matched: PairedFiles) -> bool:
    """Whether files look like the same picture twice, side by side."""
    scores = []
    for _, file, _ in matched.pairs[:5]:
        grey = cv2.cvtColor(read_rgb(file), cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (64, 32), interpolation=cv2.INTER_AREA)
        scores.append(float(np.corrcoef(small[:, :32].ravel(), small[:, 32:].ravel())[0, 1]))
    return float(np.median(scores)) > 0.6
