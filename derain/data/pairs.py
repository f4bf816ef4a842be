"""Find the image pairs of a data set, and read them."""

import os
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from derain.data import backgrounds
from derain.data.detection_cache import CACHED_FROM, Detection, detection_key, load_detection, save_detection
from derain.data.file_hashes import cached_numbers
from derain.data.layouts import LAYOUTS, Side, Split
from derain.data.name_matching import (
    ImageNames,
    PairedFiles,
    describe_contents,
    find_data_set_folders,
    folder_alias_index,
    list_unsorted,
    pair_files,
)
from derain.data.shards import ShardImage, is_url, read_split, sharded_splits
from derain.errors import DerainError
from derain.image_sources import ImageFile
from derain.images import Pixels, image_size, read_rgb
from derain.listing import natural_key
from derain.progress import track

SCENE_CORRELATION = 0.6
"""Correlation of the two halves of an image, both reduced to 32×32 pixels, above which they show the same scene."""


class PairSizeError(DerainError):
    """The rainy and the clean image of a pair differ in size."""


@dataclass(frozen=True)
class Pair:
    """A rainy image and its clean image, if there is one.

    Attributes:
        name: Name of the rainy file without suffix, or its path in the data set if names repeat; ``SEQUENCE/FRAME`` for
            a frame of a video. `merge_pairs` puts ``SET/`` before it if there are several data sets. Results are saved
            under this name.
        rainy: File of the rainy image: a path, or an image in a shard.
        clean: File of the clean image; None if there is none. It equals the rainy file if that file has both images
            side by side, and for a clean photo without a rainy image.
        clean_side: Clean half of a side-by-side file; None for separate files.
        data_set: Name of the data set, if pairs of several data sets were merged; else empty.
        sequence: Name of the video that the image is a frame of; empty for a single image.
    """

    name: str
    rainy: ImageFile
    clean: ImageFile | None = None
    clean_side: Side | None = None
    data_set: str = ""
    sequence: str = ""

    @property
    def is_photo(self) -> bool:
        """Whether this is a clean photo without a rainy image."""
        return self.clean == self.rainy and self.clean_side is None

    @property
    def scene(self) -> Hashable:
        """Clean file, or the folder of the clean frames of a video; None if there is no clean image."""
        if self.sequence and isinstance(self.clean, Path | ShardImage):
            return self.clean.parent
        return self.clean

    def size(self) -> tuple[int, int]:
        """Return height and width of the images in pixels, from the header of the rainy file or the index of shards.

        Raises:
            DerainError: If the rainy file cannot be opened.
        """
        if isinstance(self.rainy, ShardImage):
            height, width = self.rainy.height, self.rainy.width
        else:
            height, width = image_size(self.rainy)
        return (height, width) if self.clean_side is None else (height, width // 2)

    def read(self) -> tuple[Pixels, Pixels | None]:
        """Read both images.

        Returns:
            Rainy and clean pixels, ``(h, w, 3)`` in 0 to 255 each; the clean ones are None if there is no clean image.

        Raises:
            DerainError: If a file cannot be read, or a side-by-side file is one pixel wide.
            PairSizeError: If the sizes differ.
        """
        rainy = read_rgb(self.rainy)
        if self.clean_side is not None:
            left, right = split_halves(rainy, str(self.rainy))
            rainy, clean = (right, left) if self.clean_side == "left" else (left, right)
            return rainy, clean if self.clean is not None else None
        if self.clean is None:
            return rainy, None
        clean = read_rgb(self.clean)
        if rainy.shape != clean.shape:
            sizes = " and ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (rainy, clean))
            raise PairSizeError(
                f"{self.rainy}: rainy and clean image must have equal sizes, got {sizes} ({self.clean}); "
                "remove or replace the pair"
            )
        return rainy, clean


@dataclass(frozen=True)
class PairSet:
    """Pairs of one split of a data set.

    Attributes:
        name: Name of the data set, or of its folder.
        layout: Key of :data:`derain.data.layouts.LAYOUTS` by which the pairs were found.
        split: ``train``, ``test`` or ``predict``.
        root: Folder of the data set or of its shards, or URL of its shards.
        pairs: The pairs, in natural order of their names.
        notes: Notes for the user, for example how the layout was detected, or how many files have no partner.
    """

    name: str
    layout: str
    split: Split
    root: Path | str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()


def split_halves(image: Pixels, name: str = "image") -> tuple[Pixels, Pixels]:
    """Return the left and right half of a side-by-side image; the middle column of an odd width is dropped.

    Args:
        image: ``(h, 2w, 3)`` or ``(h, 2w + 1, 3)``.
        name: Name of the image in messages.

    Returns:
        Left and right half, ``(h, w, 3)`` each.

    Raises:
        DerainError: If the image is one pixel wide.
    """
    half = image.shape[1] // 2
    if half == 0:
        raise DerainError(f"{name}: is 1 pixel wide; expected a rainy and a clean image side by side; remove the file")
    return np.ascontiguousarray(image[:, :half]), np.ascontiguousarray(image[:, -half:])


def find_pairs(spec: str | Path, split: Split, *, data_root: Path | None = None) -> PairSet:
    """Return the pairs of one split of a data set.

    Args:
        spec: Name of a data set (``Rain100L``, searched below ``data_root``), a folder (its layout is detected and
            reported in the notes), or both (``Rain800:path/to/folder``). A folder that does not exist is also looked up
            in ``data_root``. Shards are given by their folder or URL (``s3://bucket/set``).
        split: ``train``, ``test``, or ``predict`` for rainy images only.
        data_root: Folder that contains the data sets; by default ``$DERAIN_DATA``.

    Raises:
        DerainError: If the data set or folder does not exist, has an unknown or ambiguous layout, or lacks the split;
            if two files match the same image of a pair; if shards cannot be read; or if the test set whose backgrounds
            are excluded cannot be found.

    Example:
        >>> find_pairs("Rain100L", "train")
        Traceback (most recent call last):
        derain.errors.DerainError: Rain100L has no train split, only test; see RainTrainL
    """
    if data_root is None and os.environ.get("DERAIN_DATA"):
        data_root = Path(os.environ["DERAIN_DATA"])
    if is_url(str(spec)):
        return _find_in_shards(str(spec), split)
    name, folder = _parse_spec(spec)
    if folder is not None and not folder.exists() and data_root is not None and (data_root / folder).exists():
        folder = data_root / folder
    if name is None and folder is not None and sharded_splits(folder):
        return _find_in_shards(folder, split)
    notes = []
    if name is not None:
        root, paired = _find_named_set(name, split, folder, data_root)
    else:
        assert folder is not None
        root = folder
        name, reason, paired = _pair_or_load(root, split)
        notes.append(f"layout {name}, detected by {reason}")
    if paired.clashes:
        first, second = paired.clashes[0]
        raise DerainError(f"{second}: belongs to the same pair as {first}; remove or rename one of them")
    if paired.variant.note:
        notes.append(paired.variant.note)
    for variant, count in paired.unused:
        notes.append(f"not used: {count} further pairs of files {variant}; to use them, move them to another folder")
    pairs = to_pairs(paired)
    layout = LAYOUTS[name]
    if layout.excluded_test_set is not None:
        total = len(pairs)
        pairs = _exclude_test_backgrounds(name, pairs, data_root or root.parent)
        excluded = total - len(pairs)
        notes.append(f"{excluded} of {total} pairs excluded: their background is in {layout.excluded_test_set}")
    if paired.unpaired:
        notes.append(f"files without partner: {len(paired.unpaired)}, first {paired.unpaired[0]}")
    expected = layout.counts.get(split)
    if expected is not None and len(pairs) != expected:
        notes.append(f"{len(pairs)} pairs, expected {expected} for {name}; run: derain data verify {root}")
    return PairSet(name if folder is None else root.resolve().name, name, split, root, pairs, tuple(notes))


def _find_in_shards(location: Path | str, split: Split) -> PairSet:
    """Return the pairs of one split of a data set in shards."""
    found = read_split(str(location), split)
    return PairSet(found.name, found.layout, split, location, to_pairs(found.files), (found.note,))


def find_pairs_or_photos(spec: str | Path, split: Split, *, data_root: Path | None = None) -> PairSet:
    """Return the pairs of a data set, or the images of a folder without pairs as clean photos.

    Args:
        spec: Data set, as for `find_pairs`.
        split: Split of the data set; a folder of photos returns the same photos for any split.
        data_root: Folder that contains the data sets, as for `find_pairs`.

    Raises:
        DerainError: As by `find_pairs`, unless ``spec`` is a folder whose images can be used as photos.
    """
    try:
        return find_pairs(spec, split, data_root=data_root)
    except DerainError as error:
        try:
            image_set = find_pairs(spec, "predict", data_root=data_root)
        except DerainError:
            raise error from None
        if image_set.layout != "images":
            raise
    photos = tuple(replace(pair, clean=pair.rainy) for pair in image_set.pairs)
    note = f"no rainy images: {len(photos)} images are used as clean photos, to which rain is added"
    return replace(image_set, split=split, pairs=photos, notes=(note,))


def to_pairs(paired: PairedFiles) -> tuple[Pair, ...]:
    """Convert paired files to pairs, in the same order."""
    side, video = paired.variant.clean_side, paired.variant.video
    return tuple(
        Pair(name, rainy, clean, side, sequence=name.rpartition("/")[0] if video else "")
        for name, rainy, clean in paired.pairs
    )


def merge_pairs(sets: Sequence[PairSet], *, allow_repeated_sets: bool = False) -> tuple[Pair, ...]:
    """Return the pairs of several data sets, named ``SET/NAME``, or those of a single one with unchanged names.

    ``SET`` includes as many parent folders as are needed to distinguish sets of the same name.

    Args:
        sets: The data sets.
        allow_repeated_sets: Whether a data set may occur several times; its pairs are then repeated.

    Raises:
        DerainError: If two different pairs would have the same name, or a data set occurs several times without
            ``allow_repeated_sets``.

    Example:
        >>> roots = [Path("x/photos"), Path("y/photos")]
        >>> sets = [PairSet("photos", "images", "predict", root, (Pair("1", root / "1.png"),)) for root in roots]
        >>> [pair.name for pair in merge_pairs(sets)]
        ['x/photos/1', 'y/photos/1']
    """
    if len(sets) == 1:
        return sets[0].pairs
    pairs_by_name: dict[str, Pair] = {}
    merged = []
    for pair_set in sets:
        same_name_roots = {Path(other.root).resolve() for other in sets if other.name == pair_set.name}
        name = pair_set.name
        if len(same_name_roots) > 1:
            name = _distinct_tail(Path(pair_set.root).resolve(), same_name_roots)
        for original in pair_set.pairs:
            sequence = original.sequence and f"{name}/{original.sequence}"
            pair = replace(original, name=f"{name}/{original.name}", data_set=name, sequence=sequence)
            merged.append(pair)
            if pair.name not in pairs_by_name:
                pairs_by_name[pair.name] = pair
                continue
            first = pairs_by_name[pair.name]
            if not (allow_repeated_sets and first == pair):
                raise DerainError(
                    f"{pair.rainy}: has the same name as {first.rainy} ({first.name}); give each data set once, and "
                    "rename folders of the same name"
                )
    return tuple(merged)


def _distinct_tail(root: Path, roots: Iterable[Path]) -> str:
    """Return the last parts of a path, as few as distinguish it from the other paths."""
    other_paths = [other.parts for other in roots if other != root]
    for count in range(1, len(root.parts) + 1):
        tail = root.parts[-count:]
        if all(parts[-count:] != tail for parts in other_paths):
            break
    return "/".join(tail).lstrip("/")


def _parse_spec(spec: str | Path) -> tuple[str | None, Path | None]:
    """Split ``NAME``, ``NAME:PATH`` or ``PATH`` into name and path; None for what is missing.

    Raises:
        DerainError: If ``spec`` is empty.
    """
    names = {name.lower(): name for name in LAYOUTS}
    if isinstance(spec, str):
        head, _, tail = spec.partition(":")
        name = names.get(head.lower())
        if name is not None and (tail or LAYOUTS[name].folders):
            return name, Path(tail).expanduser() if tail else None
    if not str(spec):
        raise DerainError(f"no data set given; expected a folder or one of {', '.join(LAYOUTS)}")
    return None, Path(spec).expanduser()


def _find_named_set(name: str, split: Split, folder: Path | None, data_root: Path | None) -> tuple[Path, PairedFiles]:
    """Return folder and paired files of a data set whose layout is known.

    Without ``folder``, the data set is searched below ``data_root``. Of several folders with pairs, the one with the
    fewest parent folders is returned.

    Raises:
        DerainError: If the data set has no such split, no folder of its name or no pairs, or if several folders with
            pairs have the fewest parent folders.
    """
    layout = LAYOUTS[name]
    if split not in layout.files and not (split == "predict" and "test" in layout.files):
        partner = f"; see {layout.partner}" if layout.partner else ""
        raise DerainError(f"{name} has no {split} split, only {' and '.join(layout.files)}{partner}")
    variants = layout.files.get(split) or layout.files["test"]
    expected = f"expected files: {' or '.join(dict.fromkeys(str(variant) for variant in variants))}"
    source = f"; get it from {layout.source}" if layout.source else ""
    if folder is not None:
        roots = [folder]
    elif data_root is None or not data_root.is_dir():
        raise DerainError(
            f"{name}: no folder of data sets ({data_root or 'DERAIN_DATA is not set'}); set the environment variable "
            f"DERAIN_DATA to it, or give {name}:path/to/folder{source}"
        )
    else:
        roots = find_data_set_folders(name, data_root)
        if not roots:
            aliases = " or ".join(layout.folders)
            raise DerainError(f"{name}: no folder {aliases} below {data_root}{source}; {expected}")
    candidates = []
    for root in roots:
        paired = _pair_or_load(root, split, name)[2]
        if paired.pairs:
            candidates.append((root, paired))
    if not candidates:
        raise DerainError(
            f"{name}: no {split} pairs in {roots[0]}, which contains {describe_contents(roots[0])}; {expected}{source}"
        )
    root, paired = candidates[0]
    for other, _ in candidates[1:]:
        if len(other.parts) == len(root.parts):
            raise DerainError(f"{name}: found in both {root} and {other}; give one of them, for example {name}:{root}")
    return root, paired


def _exclude_test_backgrounds(name: str, pairs: tuple[Pair, ...], data_root: Path) -> tuple[Pair, ...]:
    """Return the pairs whose background is not in the layout's ``excluded_test_set``; the result is cached."""
    test_name = LAYOUTS[name].excluded_test_set
    assert test_name is not None
    try:
        test_pairs = find_pairs(test_name, "test", data_root=data_root).pairs
    except DerainError as error:
        raise DerainError(
            f"{name}: cannot exclude the backgrounds of {test_name}: {error}; or use {name}-full, which has all pairs"
        ) from error
    all_pairs = (*pairs, *test_pairs)

    def whole_image_signature(pair: Pair) -> backgrounds.Signature:
        return backgrounds.compute_signature(read_clean(pair), features=False)

    def find_shared() -> list[int]:
        with ThreadPoolExecutor() as threads:
            results = threads.map(whole_image_signature, all_pairs)
            signatures = list(track(results, f"Searching {name} for backgrounds of {test_name}", len(all_pairs)))
        matches = backgrounds.find_matches(signatures[: len(pairs)], signatures[len(pairs) :], features=False)
        return sorted({match.first for match in matches})

    sides = [pair.clean_side for pair in all_pairs]
    computation = f"shared backgrounds, version {backgrounds.SEARCH_VERSION}, {len(pairs)} pairs, {sides}"
    shared = set(cached_numbers(computation, [pair.clean or pair.rainy for pair in all_pairs], find_shared))
    return tuple(pair for index, pair in enumerate(pairs) if index not in shared)


def read_clean(pair: Pair) -> Pixels:
    """Read the clean image of a pair that has one, ``(h, w, 3)`` in 0 to 255; a separate rainy file is not decoded."""
    if pair.clean is not None and pair.clean_side is None:
        return read_rgb(pair.clean)
    _, clean = pair.read()
    assert clean is not None
    return clean


def detect_layout(root: Path, split: Split, files: Sequence[str] | None = None) -> tuple[str, str, PairedFiles]:
    """Detect the layout of a folder by its name or that of its parent, or else by the files in it.

    Args:
        root: The folder.
        split: Split to look for.
        files: Relative paths of the images below the folder, with ``/``; listed by default.

    Returns:
        Name of the layout, what it was detected by, and the paired files.

    Raises:
        DerainError: If the folder does not exist, an image cannot be read, no layout fits, or several layouts find
            equally many, but different pairs.
    """
    images = ImageNames(root, files)
    candidates: dict[str, PairedFiles] = {}
    for name, layout in LAYOUTS.items():
        paired = images.pair(name, split)
        if not paired.pairs or name == "video":  # pairs in subfolders of any layout would match it
            continue
        for folder in (root.absolute(), root.absolute().parent, root.resolve(), root.resolve().parent):
            if folder_alias_index(folder, name) is not None:
                return name, f"the name of the folder {folder}", paired
        if layout.excluded_test_set is not None or (paired.variant.clean is None and paired.variant.clean_side is None):
            continue  # the full set has the same files; a layout without clean images fits any folder of images
        side_by_side = paired.variant.clean_side is not None
        if side_by_side and (split == "predict" or not _halves_show_one_scene(paired)):
            continue
        candidates[name] = paired
    if not candidates:
        if split == "predict" and images.files:
            return "images", "the lack of clean images", images.pair("images", split)
        expected = "; ".join(str(variant) for variant in LAYOUTS["folder"].files["test"])
        raise DerainError(
            f"{root}: no {split} pairs; contains {describe_contents(root)}; expected {expected}; "
            "give other layouts by name, as in Rain800:path (see derain data list)"
        )
    most_pairs = max(len(paired.pairs) for paired in candidates.values())
    best = {name: paired for name, paired in candidates.items() if len(paired.pairs) == most_pairs}
    files_of_pairs = {
        (frozenset((rainy, clean) for _, rainy, clean in paired.pairs), paired.variant.clean_side)
        for paired in best.values()
    }
    if len(files_of_pairs) > 1:
        options = " or ".join(f"{name}:{root} ({paired.variant})" for name, paired in best.items())
        raise DerainError(f"{root}: several layouts fit and disagree about the pairs; give one: {options}")
    name = "folder" if "folder" in best else next(iter(best))
    return name, f"the files ({best[name].variant})", best[name]


def _pair_or_load(root: Path, split: Split, name: str | None = None) -> Detection:
    """Return layout, reason for it and paired files of a folder; those of a large folder from the cache.

    The cache is used if no file was added, removed or renamed. To detect a layout, some images are read. So a detected
    layout is also detected again if any file has changed.

    Args:
        root: The folder.
        split: Split to look for.
        name: Layout of the folder; detected by default.
    """
    files = sorted(list_unsorted(root))  # far faster than in natural order

    def pair() -> Detection:
        ordered = sorted(files, key=natural_key)
        if name is None:
            return detect_layout(root, split, ordered)
        return name, "", pair_files(name, split, root, ordered)

    if len(files) < CACHED_FROM:
        return pair()
    key = detection_key(root, split, name, files)
    cached = load_detection(key, root, files)
    if cached is not None:
        layout, reason, paired = cached
        return layout, f"{reason}; from the cache, since no file has changed", paired
    detection = pair()
    save_detection(key, root, files, detection)
    return detection


def _halves_show_one_scene(paired: PairedFiles) -> bool:
    """Return whether the left and right halves of most of the first five files show the same scene."""
    correlations = []
    for _, file, _ in paired.pairs[:5]:
        grey = cv2.cvtColor(read_rgb(file), cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (64, 32), interpolation=cv2.INTER_AREA)
        correlations.append(float(np.corrcoef(small[:, :32].ravel(), small[:, 32:].ravel())[0, 1]))
    return float(np.median(correlations)) > SCENE_CORRELATION
