"""Finds what is wrong with data sets: lost, damaged, mismatched, exchanged and repeated images, and leaks."""

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
from derain.data.discovery import DataSplit, find_sets
from derain.data.layouts import LAYOUTS
from derain.data.pair_sides import rain_cues, rain_scores
from derain.data.pairs import Pair, to_pairs
from derain.errors import DerainError
from derain.image_sources import several_frames
from derain.images import exif_problem, list_images, natural_key
from derain.progress import track

Kind = Literal[
    "skipped",
    "count",
    "unreadable",
    "frames",
    "size",
    "exif",
    "unpaired",
    "unused",
    "clash",
    "swapped",
    "leak",
    "duplicate",
    "shared",
    "backgrounds",
]
Level = Literal["error", "warning", "note"]

SURE = 2.0
"""Log-odds from which a pair counts as surely exchanged (88 in 100)."""


@dataclass(frozen=True)
class Finding:
    """Something to know about a data set.

    Attributes:
        kind: ``skipped`` (images of formats that are not read, broken links), ``count`` (not as many pairs as
            published), ``unreadable``, ``frames`` (several frames or pages, of which the first is read), ``size``
            (rainy and clean differ), ``exif`` (invalid, so that an image may lie on its side), ``unpaired``,
            ``unused`` (pairs of another version of the set in the same folder), ``clash`` (two files fit one pair),
            ``swapped`` (rain on the clean side), ``leak`` (a test image's background outside of the test set),
            ``duplicate`` (one background several times in a split), ``shared`` (one background in two sets, and no
            leak), ``backgrounds`` (how many there are).
        files: The files concerned; of a leak the test image first.
        detail: What is the matter, in words.
        level: ``error`` is wrong, ``warning`` needs a look, ``note`` is good to know.
        set: Set and split.
    """

    kind: Kind
    files: tuple[str, ...]
    detail: str
    level: Level = "error"
    set: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """A clean image, or a rainy one without clean, and the rainy ones on it, once they were read."""

    file: Path
    background: Signature | None = None
    rainy: Signature | None = None  # the first on it
    cues: tuple[tuple[Pair, NDArray[np.float64]], ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(eq=False)
class _Images:
    """All images that could be read, in one order."""

    files: list[str] = field(default_factory=list)
    owners: list[DataSplit] = field(default_factory=list)
    backgrounds: list[Signature] = field(default_factory=list)
    rainy: list[Signature] = field(default_factory=list)


def verify(
    root: Path, *, against: Sequence[Path] = (), layout: str | None = None
) -> tuple[list[DataSplit], list[Finding]]:
    """Checks the sets below a folder, and compares their backgrounds with one another.

    Args:
        root: A set's folder, or a folder that holds several.
        against: Folders of sets that must not share a background with those of ``root``.
        layout: The layout of ``root``, if it shall not be detected.

    Returns:
        The splits found in ``root`` and the findings, both in a fixed order.

    Raises:
        DerainError: If a folder is absent or holds no set.
    """
    sets = find_sets(root, layout)
    others = [one for other in against for one in find_sets(other)]
    findings = [
        Finding("skipped", tuple(map(str, paths)), f"{len(paths)} {reason}; not read", "warning")
        for folder in (root, *against)
        for reason, paths in list_images(folder, recursive=True).skipped.items()
    ]
    findings += [finding for one in sets for finding in _check_files(one)]
    groups = [(one, group) for one in (*sets, *others) for group in _by_clean(to_pairs(one.matched))]
    images = _Images()
    cues: dict[DataSplit, list[tuple[Pair, NDArray[np.float64]]]] = {one: [] for one in sets}
    with ThreadPoolExecutor() as threads:
        read = threads.map(lambda item: _read(*item), groups)
        for (one, _), seen in zip(groups, track(read, "Reading images", len(groups)), strict=True):
            findings += seen.findings
            if one in cues:
                cues[one] += seen.cues
            if seen.background is not None and seen.rainy is not None:
                images.files.append(str(seen.file))
                images.owners.append(one)
                images.backgrounds.append(seen.background)
                images.rainy.append(seen.rainy)
    for one in sets:
        findings += _check_sides(one, cues[one])
    with Console(stderr=True).status(f"Comparing {len(images.files)} backgrounds"):
        findings += _compare(sets, images)
    order = ["", *(str(one) for one in (*sets, *others))]
    kinds = get_args(Kind)
    findings.sort(key=lambda f: (order.index(f.set), kinds.index(f.kind), natural_key("\n".join(f.files))))
    return sets, findings


def _check_files(one: DataSplit) -> Iterator[Finding]:
    """What the names of the files tell."""
    folders = LAYOUTS[one.layout].folders
    same_files = [layout for layout in LAYOUTS.values() if folders and layout.folders == folders]
    expected = sorted({layout.counts[one.split] for layout in same_files if one.split in layout.counts})
    count = len(one.matched.pairs)
    if expected and count not in expected:
        told = " or ".join(str(number) for number in expected)
        yield Finding("count", (str(one.root),), f"{count} pairs, published are {told}", set=str(one))
    for file in one.matched.unpaired:
        yield Finding("unpaired", (str(file),), "has no partner", set=str(one))
    for first, second in one.matched.clashes:
        yield Finding("clash", (str(first), str(second)), "fit the same pair", set=str(one))
    for variant, count in one.matched.unused:
        yield Finding("unused", (str(one.root),), f"{count} further pairs of files {variant}", "warning", str(one))


def _by_clean(pairs: Sequence[Pair]) -> list[list[Pair]]:
    groups: dict[Path, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.clean or pair.rainy].append(pair)
    return list(groups.values())


def _read(one: DataSplit, group: Sequence[Pair]) -> Seen:
    """Reads the pairs of one clean image."""
    findings, cues = [], []
    background = first = None
    for pair in group:
        files = tuple(dict.fromkeys(str(file) for file in (pair.rainy, pair.clean) if file is not None))
        try:
            rainy, clean = pair.read()
        except DerainError as error:
            kind: Kind = "size" if "of one size" in str(error) else "unreadable"
            broken = files if kind == "size" else tuple(file for file in files if str(error).startswith(f"{file}:"))
            told = str(error).removeprefix(f"{broken[0] if broken else files[0]}: ")
            findings.append(Finding(kind, broken or files, told, set=str(one)))
            continue
        for file in files:
            if several_frames(Path(file)):
                findings.append(Finding("frames", (file,), "several frames or pages; first read", "warning", str(one)))
        problems = ((file, exif_problem(Path(file))) for file in files)
        findings += [Finding("exif", (file,), problem, "warning", str(one)) for file, problem in problems if problem]
        if background is None:
            background = compute_signature(rainy if clean is None else clean, rainy=clean is None)
            first = compute_signature(rainy, local=False)
        if clean is not None:
            cues.append((pair, rain_cues(rainy, clean)))
    return Seen(group[0].clean or group[0].rainy, background, first, tuple(cues), tuple(findings))


def _check_sides(one: DataSplit, cues: Sequence[tuple[Pair, NDArray[np.float64]]]) -> Iterator[Finding]:
    """Pairs that have the rain on the clean side."""
    if not cues:
        return
    scores = rain_scores([cue for _, cue in cues])
    if len(cues) > 1 and np.median(scores) < -SURE:
        told = f"rainy and clean are exchanged throughout, expected {one.matched.variant}; name the right layout"
        yield Finding("swapped", (str(one.root),), told, set=str(one))
        return
    for (pair, _), score in zip(cues, scores, strict=True):
        if score < 0:
            files = tuple(dict.fromkeys((str(pair.rainy), str(pair.clean))))
            sure = score < -SURE
            told = f"rainy and clean {'are' if sure else 'may be'} exchanged (log-odds {-score:.1f})"
            yield Finding("swapped", files, told, "error" if sure else "warning", str(one))


def _compare(sets: Sequence[DataSplit], images: _Images) -> Iterator[Finding]:
    """Backgrounds that appear more than once, in one split or in two."""
    inside: dict[DataSplit, list[BackgroundMatch]] = defaultdict(list)
    leaks: dict[tuple[int, DataSplit], list[tuple[int, BackgroundMatch]]] = defaultdict(list)
    shared: dict[tuple[DataSplit, DataSplit], list[BackgroundMatch]] = defaultdict(list)
    for match in find_matches(images.backgrounds):
        one, other = images.owners[match.first], images.owners[match.second]
        checked = [owner in sets for owner in (one, other)]
        if one is other and all(checked):
            inside[one].append(match)
        elif all(checked) and (one.split == "train") == (other.split == "train"):
            shared[one, other].append(match)
        elif any(checked):
            test_is_first = other.split == "train" if one.split != other.split else not checked[0]
            tested, known = (match.first, match.second) if test_is_first else (match.second, match.first)
            leaks[tested, images.owners[known]].append((known, match))
    for (tested, place), matches in leaks.items():
        files = (images.files[tested], *(images.files[index] for index, _ in matches))
        ways = [Path(images.files[index]).name + f" ({match})" * (str(match) != "whole") for index, match in matches]
        told = f"its background is in {place}: {', '.join(ways)}"
        yield Finding("leak", files, told, set=str(images.owners[tested]))
    for one, repeated in inside.items():
        yield from _duplicates(one, images, repeated)
    for (one, other), common in shared.items():
        files = tuple(dict.fromkeys(images.files[index] for m in common for index in (m.first, m.second)))
        counts = [len({m.first for m in common}), len({m.second for m in common})]
        told = f"{counts[0]} of its images share their background with {counts[1]} of {other}"
        yield Finding("shared", files, told, "note", str(one))


def _duplicates(one: DataSplit, images: _Images, matches: Sequence[BackgroundMatch]) -> Iterator[Finding]:
    """Groups of images of one background, and how many distinct backgrounds there are."""
    groups: dict[int, list[BackgroundMatch]] = {}
    for match in matches:
        of_match = [first for first, group in groups.items() if {match.first, match.second} & _indices(group)]
        joined = [*(found for first in of_match for found in groups.pop(first)), match]
        groups[min(_indices(joined))] = joined
    for _, group in sorted(groups.items()):
        indices = sorted(_indices(group))
        same_rain = find_matches([images.rainy[index] for index in indices], crops=False)
        told = f"one background {len(indices)} times"
        told += "".join(f", {way}" for way in dict.fromkeys(str(match) for match in group) if way != "whole")
        told += f", {'the same' if same_rain else 'other'} rain"
        level: Level = "error" if same_rain or one.split != "train" else "note"
        yield Finding("duplicate", tuple(images.files[index] for index in indices), told, level, str(one))
    total = images.owners.count(one)
    distinct = total - sum(len(_indices(group)) - 1 for group in groups.values())
    yield Finding(
        "backgrounds", (str(one.root),), f"{total} images show {distinct} distinct backgrounds", "note", str(one)
    )


def _indices(matches: Sequence[BackgroundMatch]) -> set[int]:
    return {index for match in matches for index in (match.first, match.second)}
