"""Pairs of rainy and clean images: found by key, read from files."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from derain.data import backgrounds
from derain.data.layouts import AUXILIARY, LAYOUTS, SPLIT_FOLDERS, Files, Side, Split
from derain.errors import DerainError
from derain.images import Pixels, image_files, natural_key, read_rgb

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
            left, right = halves(rainy)
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


def halves(image: Pixels) -> tuple[Pixels, Pixels]:
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
        derain.errors.DerainError: Rain100L has no train split, only test; its other part is RainTrainL
    """
    name, path = _parse(spec)
    if data_root is None and "DERAIN_DATA" in os.environ:
        data_root = Path(os.environ["DERAIN_DATA"])
    if path is not None and not path.exists() and data_root is not None and (data_root / path).is_dir():
        path = data_root / path
    if name is None:
        assert path is not None
        name, matched = detect(path, split)
        root = path
    else:
        root, matched = _named(name, split, path, data_root)
    if matched.clashes:
        first, second = matched.clashes[0]
        raise DerainError(f"{second}: takes the same place in a pair as {first}; remove one of them")
    layout, pairs, notes = LAYOUTS[name], matched.pairs, list(matched.notes)
    if matched.unpaired:
        count = f"{len(matched.unpaired)} files" if len(matched.unpaired) > 1 else "1 file"
        notes.append(
            f"{count} without partner left out, first {matched.unpaired[0]}; run: derain data verify {root}"
        )
    if layout.without is not None:
        pairs = _without(name, pairs, data_root or root.parent)
        notes.append(
            f"{len(matched.pairs) - len(pairs)} of {len(matched.pairs)} pairs left out, "
            f"their background is in {layout.without}"
        )
    expected = layout.counts.get(split)
    if expected is not None and len(pairs) != expected:
        notes.append(f"{len(pairs)} pairs where {name} has {expected}; run: derain data verify {root}")
    return PairSet(name if path is None else root.resolve().name, name, split, root, pairs, tuple(notes))


def _parse(spec: str | Path) -> tuple[str | None, Path | None]:
    """Takes a set's name, ``name:path`` or a path apart."""
    names = {name.lower(): name for name in LAYOUTS}
    text = str(spec)
    if isinstance(spec, str):
        if text.lower() in names and LAYOUTS[names[text.lower()]].folders:
            return names[text.lower()], None
        head, colon, tail = text.partition(":")
        if colon and head.lower() in names and tail:
            return names[head.lower()], Path(tail).expanduser()
    if not text:
        raise DerainError(f"no data set named; give one of {', '.join(LAYOUTS)} or a folder")
    return None, Path(spec).expanduser()


def _named(name: str, split: Split, path: Path | None, data_root: Path | None) -> tuple[Path, Matched]:
    """The folder and the pairs of a set whose layout is given."""
    layout = LAYOUTS[name]
    if split not in layout.files and not (split == "predict" and "test" in layout.files):
        other = f"; its other part is {layout.partner}" if layout.partner else ""
        raise DerainError(f"{name} has no {split} split, only {', '.join(layout.files)}{other}")
    wanted = " or ".join(
        dict.fromkeys(str(files) for files in layout.files.get(split, layout.files.get("test", ())))
    )
    source = f"; get it from {layout.source}" if layout.source else ""
    if path is not None:
        roots = [path]
    elif data_root is None:
        raise DerainError(
            f"{name}: where the data sets are is not known; set the environment variable DERAIN_DATA "
            f"to the folder that holds them, or give {name}:path/to/folder{source}"
        )
    else:
        roots = set_folders(name, data_root)
        if not roots:
            raise DerainError(
                f"{name}: no folder named {' or '.join(layout.folders)} below {data_root}{source}; "
                f"expected files in it: {wanted}"
            )
    found = [(root, matched) for root in roots if (matched := match_split(name, split, root)).pairs]
    if not found:
        raise DerainError(
            f"{name}: no {split} pairs in {roots[0]}, which holds {inventory(roots[0])}; "
            f"expected files: {wanted}{source}"
        )
    root, matched = found[0]
    for other, _ in found[1:]:
        if len(other.parts) == len(root.parts) and other.resolve() != root.resolve():
            raise DerainError(f"{name}: both {root} and {other} hold it; say which: {name}:{root}")
    return root, matched


def _without(name: str, pairs: tuple[Pair, ...], data_root: Path) -> tuple[Pair, ...]:
    """Leaves out pairs whose background is in the test set that the layout names."""
    other = LAYOUTS[name].without
    assert other is not None
    try:
        test = find_pairs(other, "test", data_root=data_root).pairs
    except DerainError as error:
        raise DerainError(
            f"{name} leaves out what shares a background with {other}, which is needed to tell: {error}; "
            f"for all pairs use {name}-full"
        ) from error
    matches = backgrounds.same(_clean_images(pairs), _clean_images(test), crops=False)
    leaked = {match.first for match in matches}
    return tuple(pair for index, pair in enumerate(pairs) if index not in leaked)


def detect(path: Path, split: Split, files: Sequence[str] | None = None) -> tuple[str, Matched]:
    """Finds the layout of a folder, by its name, else by the files in it, and pairs them.

    Args:
        path: The folder.
        split: Which pairs it shall give.
        files: Image files below it, ``/`` between folders; listed if not given.

    Returns:
        The layout's name and its pairs; the notes say what spoke for it.

    Raises:
        DerainError: If no layout gives pairs, or several disagree on them.
    """
    files = listing(path) if files is None else files
    fits: dict[str, Matched] = {}
    for name, layout in LAYOUTS.items():
        matched = match_split(name, split, path, files) if name != "images" else Matched(())
        if not matched.pairs:
            continue
        real = path.resolve()
        if any(_named_like(folder, name) is not None for folder in (real, real.parent)):
            return name, _noted(matched, f"layout {name}, by the folder's name")
        if layout.without is None and (matched.pairs[0].clean_side is None or _two_alike(matched.pairs[:5])):
            fits[name] = matched
    if (
        split == "predict"
        and files
        and not any(matched.pairs[0].clean_side is None for matched in fits.values())
    ):
        return "images", _noted(match_split("images", split, path, files), "a folder of rainy photos")
    if not fits:
        kinds = "; ".join(dict.fromkeys(str(files) for files in LAYOUTS["folder"].files["train"]))
        raise DerainError(
            f"{path}: no {split} pairs found, it holds {inventory(path)}; expected {kinds}, "
            "or name the layout: Rain800:path (derain data list shows all)"
        )
    most = max(len(matched.pairs) for matched in fits.values())
    best = {name: matched for name, matched in fits.items() if len(matched.pairs) == most}
    if len({matched.pairs for matched in best.values()}) > 1:
        options = " or ".join(f"{name}:{path} ({matched.variant})" for name, matched in best.items())
        raise DerainError(f"{path}: more than one layout fits, and they disagree; say which: {options}")
    name = "folder" if "folder" in best else next(iter(best))
    return name, _noted(best[name], f"layout {name}, by the files: {best[name].variant}")


def _noted(matched: Matched, note: str) -> Matched:
    return replace(matched, notes=(note, *matched.notes))


def _two_alike(pairs: Sequence[Pair]) -> bool:
    """Whether files look like the same picture twice, side by side."""
    scores = []
    for pair in pairs:
        small = cv2.resize(
            cv2.cvtColor(read_rgb(pair.rainy), cv2.COLOR_RGB2GRAY), (64, 32), interpolation=cv2.INTER_AREA
        )
        scores.append(float(np.corrcoef(small[:, :32].ravel(), small[:, 32:].ravel())[0, 1]))
    return float(np.median(scores)) > 0.6
