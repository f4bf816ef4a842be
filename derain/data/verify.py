"""Check data sets for missing, damaged, mismatched, swapped and repeated images, and leaks between splits."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from derain.data.backgrounds import BackgroundMatch, Signature, compute_signature, find_matches
from derain.data.discovery import DataSplit, find_lone_sides, find_sets
from derain.data.layouts import LAYOUTS
from derain.data.pair_sides import rain_cues, rain_scores
from derain.data.pairs import Pair, PairSizeError, to_pairs
from derain.data.sequences import frame_gaps
from derain.errors import DerainError
from derain.image_sources import ImageFile, several_frames
from derain.images import exif_problem
from derain.listing import list_images, natural_key
from derain.progress import track

Kind = Literal[
    "skipped",
    "count",
    "unreadable",
    "frames",
    "size",
    "exif",
    "unpaired",
    "gap",
    "unused",
    "clash",
    "swapped",
    "leak",
    "duplicate",
    "shared",
    "backgrounds",
]
Level = Literal["error", "warning", "note"]
Cues = tuple[tuple[Pair, NDArray[np.float64]], ...]
"""Pairs with their results of `rain_cues`."""

CERTAIN_LOG_ODDS = 2.0
"""Log-odds of a swap above which it is an error instead of a warning (probability 0.88)."""


@dataclass(frozen=True)
class Finding:
    """Result of a check of a data set.

    Attributes:
        kind: ``skipped`` (unsupported formats, broken links), ``count`` (not the published number of pairs),
            ``unreadable``, ``frames`` (several frames or pages, only the first of which is read), ``size`` (rainy and
            clean image differ), ``exif`` (invalid, so that the orientation may be wrong), ``unpaired``, ``gap`` (in the
            numbers of the frames of a video), ``unused`` (pairs of another version of the data set in the same folder),
            ``clash`` (two files match one image of a pair), ``swapped`` (rainy and clean image), ``leak`` (a test image
            whose background is in a training set; of two training sets or two test sets, the one in ``against`` counts
            as the test set), ``duplicate`` (one background several times in a split), ``shared`` (one background in two
            training sets or two test sets in ``root``), ``backgrounds`` (number of distinct backgrounds).
        files: Files concerned, or the folder of the data set; for a leak, the test image first; for a gap, the frames
            after gaps.
        detail: Description.
        level: ``error``, ``warning`` or ``note``.
        set: Data set and split; empty for skipped files.
    """

    kind: Kind
    files: tuple[str, ...]
    detail: str
    level: Level = "error"
    set: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the attributes by name, for a JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class _CheckedImage:
    """Result of reading a clean image and its rainy images, or a rainy image without a clean one."""

    file: ImageFile
    background: Signature | None = None
    rainy: Signature | None = None  # of the first readable rainy image
    cues: Cues = ()
    findings: tuple[Finding, ...] = ()


@dataclass(eq=False)
class _Images:
    """Images whose backgrounds are compared, of all data sets; the lists have equal length and order."""

    files: list[str] = field(default_factory=list)
    splits: list[DataSplit] = field(default_factory=list)
    backgrounds: list[Signature] = field(default_factory=list)
    rainy: list[Signature] = field(default_factory=list)

    def add(self, image: _CheckedImage, split: DataSplit) -> None:
        if image.background is None or image.rainy is None:
            return
        self.files.append(str(image.file))
        self.splits.append(split)
        self.backgrounds.append(image.background)
        self.rainy.append(image.rainy)


def verify(
    root: Path, *, against: Sequence[Path] = (), layout: str | None = None
) -> tuple[list[DataSplit], list[Finding]]:
    """Check the data sets in a folder, and compare the backgrounds of their images, also with those in ``against``.

    Of a video, only the background of the first readable frame is compared, since the other frames show the same scene.

    Args:
        root: Folder of one data set or of several, or folder of shards.
        against: Folders of data sets that must not share backgrounds with those in ``root``.
        layout: Layout of ``root``; detected by default.

    Returns:
        The splits in ``root``, and the findings, both in a fixed order.

    Raises:
        DerainError: If a folder does not exist or contains no data set, or the layout is unknown.
    """
    splits = find_sets(root, layout)
    other_splits = [split for folder in against for split in find_sets(folder)]
    findings: list[Finding] = []
    for folder in (root, *against):
        for reason, paths in list_images(folder, recursive=True).skipped.items():
            files = tuple(str(path) for path in paths)
            findings.append(Finding("skipped", files, f"{len(paths)} {reason}; not read", "warning"))
    for split in splits:
        findings += _check_files(split)
    lone_sides = list(find_lone_sides(root, splits)) if layout is None else []
    for name, paths in lone_sides:
        detail = f"{len(paths)} files, but no pair: all rainy or all clean files are missing, or have other names"
        findings.append(Finding("unpaired", tuple(map(str, paths)), detail, set=name))
    images = _Images()
    sequences: set[tuple[DataSplit, str]] = set()
    cues: dict[DataSplit, Cues] = dict.fromkeys(splits, ())
    groups = [(split, group) for split in (*splits, *other_splits) for group in _group_by_clean(to_pairs(split.files))]
    with ThreadPoolExecutor() as threads:
        results = track(threads.map(lambda group: _check_group(*group), groups), "Reading images", len(groups))
        for (split, pairs), image in zip(groups, results, strict=True):
            findings += image.findings
            if split in cues:
                cues[split] += image.cues
            sequence = pairs[0].sequence
            if image.background is not None and (not sequence or (split, sequence) not in sequences):
                images.add(image, split)
                sequences.add((split, sequence))
    for split in splits:
        findings += _check_sides(split, cues[split])
    with Console(stderr=True).status(f"Comparing {len(images.files)} backgrounds"):
        findings += _check_backgrounds(splits, images)
    set_order = ["", *(name for name, _ in lone_sides), *(str(split) for split in (*splits, *other_splits))]
    kind_order = get_args(Kind)
    findings.sort(
        key=lambda finding: (
            set_order.index(finding.set),
            kind_order.index(finding.kind),
            natural_key("\n".join(finding.files)),
        )
    )
    return splits, findings


def _check_files(split: DataSplit) -> Iterator[Finding]:
    """Check the number and names of files, without reading images."""
    own = LAYOUTS[split.layout]
    # RainTrainH and RainTrainH-full have the same files, but different numbers of pairs.
    same_files = [layout for layout in LAYOUTS.values() if (layout.folders, layout.files) == (own.folders, own.files)]
    published = sorted({layout.counts[split.split] for layout in same_files if split.split in layout.counts})
    count = len(split.files.pairs)
    if published and count not in published:
        numbers = " or ".join(str(number) for number in published)
        yield Finding("count", (str(split.root),), f"{count} pairs; the published set has {numbers}", set=str(split))
    for file in split.files.unpaired:
        yield Finding("unpaired", (str(file),), "no partner", set=str(split))
    pairs = to_pairs(split.files)
    gaps = frame_gaps(pairs)
    if gaps:
        detail = "no frame with the number before; frames may be missing"
        yield Finding("gap", tuple(str(pairs[index].rainy) for index in gaps), detail, "warning", str(split))
    for first, second in split.files.clashes:
        yield Finding("clash", (str(first), str(second)), "belong to the same pair", set=str(split))
    for variant, count in split.files.unused:
        yield Finding("unused", (str(split.root),), f"{count} further pairs of files {variant}", "warning", str(split))


def _group_by_clean(pairs: Sequence[Pair]) -> list[list[Pair]]:
    groups: dict[ImageFile, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.clean or pair.rainy].append(pair)
    return list(groups.values())


def _check_group(split: DataSplit, pairs: Sequence[Pair]) -> _CheckedImage:
    """Read and check the pairs of one clean image, or a rainy image without a clean one."""
    findings: list[Finding] = []
    cues = []
    background = first_rainy = None
    for pair in pairs:
        images = dict.fromkeys(file for file in (pair.rainy, pair.clean) if file is not None)
        files = tuple(str(file) for file in images)
        try:
            rainy, clean = pair.read()
        except DerainError as error:
            findings.append(_read_failure(split, files, error))
            continue
        findings += _check_metadata(split, tuple(images))
        if background is None:
            background = compute_signature(rainy if clean is None else clean, rainy=clean is None)
            first_rainy = compute_signature(rainy, features=False)
        if clean is not None:
            cues.append((pair, rain_cues(rainy, clean)))
    return _CheckedImage(pairs[0].clean or pairs[0].rainy, background, first_rainy, tuple(cues), tuple(findings))


def _read_failure(split: DataSplit, files: tuple[str, ...], error: DerainError) -> Finding:
    """Return the finding for a pair that cannot be read."""
    message = str(error)
    if isinstance(error, PairSizeError):
        kind: Kind = "size"
        broken = files
    else:
        kind = "unreadable"
        broken = tuple(file for file in files if message.startswith(f"{file}:"))
    subject = broken[0] if broken else files[0]
    return Finding(kind, broken or files, message.removeprefix(f"{subject}: "), set=str(split))


def _check_metadata(split: DataSplit, files: tuple[ImageFile, ...]) -> Iterator[Finding]:
    for file in files:
        if several_frames(file):
            detail = "several frames or pages; only the first is read"
            yield Finding("frames", (str(file),), detail, "warning", str(split))
    for file in files:
        problem = exif_problem(file)
        if problem:
            yield Finding("exif", (str(file),), problem, "warning", str(split))


def _check_sides(split: DataSplit, cues: Cues) -> Iterator[Finding]:
    """Find pairs whose rainy and clean images are swapped; yield one finding if these are most pairs of the split."""
    if not cues:
        return
    scores = rain_scores([cue for _, cue in cues])
    if len(cues) > 1 and np.median(scores) < -CERTAIN_LOG_ODDS:
        detail = (
            f"rainy and clean are swapped in most pairs; expected {split.files.variant}; "
            "give the right layout by --layout"
        )
        yield Finding("swapped", (str(split.root),), detail, set=str(split))
        return
    for (pair, _), score in zip(cues, scores, strict=True):
        if score >= 0:
            continue
        files = tuple(dict.fromkeys((str(pair.rainy), str(pair.clean))))
        certain = score < -CERTAIN_LOG_ODDS
        detail = f"rainy and clean {'are' if certain else 'may be'} swapped (log-odds {-score:.1f})"
        yield Finding("swapped", files, detail, "error" if certain else "warning", str(split))


def _check_backgrounds(checked: Sequence[DataSplit], images: _Images) -> Iterator[Finding]:
    """Find backgrounds that occur several times, in one split or in two of them.

    Args:
        checked: The splits in ``root``; matches of two images that are not in these splits are ignored.
        images: Images of all splits, also of those in ``against``.
    """
    duplicates: dict[DataSplit, list[BackgroundMatch]] = defaultdict(list)
    leaks: dict[tuple[int, DataSplit], list[tuple[int, BackgroundMatch]]] = defaultdict(list)
    shared: dict[tuple[DataSplit, DataSplit], list[BackgroundMatch]] = defaultdict(list)
    for match in find_matches(images.backgrounds):
        first, second = images.splits[match.first], images.splits[match.second]
        if first not in checked and second not in checked:
            continue
        both_checked = first in checked and second in checked
        if first is second:
            duplicates[first].append(match)
        elif both_checked and (first.split == "train") == (second.split == "train"):
            shared[first, second].append(match)
        else:
            # Of two training sets or two test sets, the one in ``against`` counts as the test set.
            test_is_first = first not in checked if first.split == second.split else second.split == "train"
            if test_is_first:
                leaks[match.first, second].append((match.second, match))
            else:
                leaks[match.second, first].append((match.first, match))
    for (test_index, split), copies in leaks.items():
        yield _leak(test_index, split, copies, images)
    for split, matches in duplicates.items():
        yield from _duplicates(split, images, matches)
    for (first, second), matches in shared.items():
        files = tuple(dict.fromkeys(images.files[index] for m in matches for index in (m.first, m.second)))
        first_count = len({match.first for match in matches})
        second_count = len({match.second for match in matches})
        detail = f"{first_count} of its images share their background with {second_count} of {second}"
        yield Finding("shared", files, detail, "note", str(first))


def _leak(test_index: int, split: DataSplit, copies: list[tuple[int, BackgroundMatch]], images: _Images) -> Finding:
    """Return the finding for a test image whose background is in another split.

    Args:
        test_index: Index of the test image in ``images``.
        split: The other split.
        copies: Index and match of each image in the other split with the background.
        images: Images of all splits.
    """
    files = [images.files[test_index]]
    descriptions = []
    for index, match in copies:
        files.append(images.files[index])
        change = "" if str(match) == "unchanged" else f" ({match})"
        descriptions.append(Path(images.files[index]).name + change)
    detail = f"its background is in {split}: {', '.join(descriptions)}"
    return Finding("leak", tuple(files), detail, set=str(images.splits[test_index]))


def _duplicates(split: DataSplit, images: _Images, matches: Sequence[BackgroundMatch]) -> Iterator[Finding]:
    """Yield a finding for each group of images with one background, and one with the number of distinct backgrounds."""
    groups = _connected_groups(matches)
    repeats = 0
    for group in groups:
        indices = sorted(_indices(group))
        repeats += len(indices) - 1
        same_rain = find_matches([images.rainy[index] for index in indices], features=False)
        changes = [change for change in dict.fromkeys(str(match) for match in group) if change != "unchanged"]
        detail = ", ".join([f"one background {len(indices)} times", *changes])
        detail += ", the same rain" if same_rain else ", different rain"
        level: Level = "error" if same_rain or split.split != "train" else "note"
        yield Finding("duplicate", tuple(images.files[index] for index in indices), detail, level, str(split))
    total = images.splits.count(split)
    subject = "first frames of sequences" if split.files.variant.video else "images"
    detail = f"{total} {subject} show {total - repeats} distinct backgrounds"
    yield Finding("backgrounds", (str(split.root),), detail, "note", str(split))


def _connected_groups(matches: Sequence[BackgroundMatch]) -> list[list[BackgroundMatch]]:
    """Group matches that share images, directly or through other matches; sorted by the first index of each group."""
    groups: dict[int, list[BackgroundMatch]] = {}
    for match in matches:
        overlapping = [first for first, group in groups.items() if {match.first, match.second} & _indices(group)]
        merged = []
        for first in overlapping:
            merged += groups.pop(first)
        merged.append(match)
        groups[min(_indices(merged))] = merged
    return [group for _, group in sorted(groups.items())]


def _indices(matches: Sequence[BackgroundMatch]) -> set[int]:
    return {index for match in matches for index in (match.first, match.second)}
