"""Find the clean image of each derained image by file name."""

import itertools
import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from derain.data.layouts import Split
from derain.data.pairs import Pair, find_pairs
from derain.errors import DerainError
from derain.images import Pixels, image_size, read_rgb
from derain.listing import image_files, list_images, warn_once

SPLITS: tuple[Split, ...] = ("test", "train")
"""Splits of a data set that the derained images may belong to."""

Key = tuple[str, ...]
"""Words and numbers of a name by which images are matched."""

K = TypeVar("K", bound=Hashable)

References = dict[str, Path | Pair]
"""Clean files, or pairs that contain the clean images, by name."""


@dataclass(frozen=True)
class ScoringPair:
    """A derained image and its clean image.

    Attributes:
        name: Name of the image in the scores.
        derained: Derained file.
        clean: Clean file, or the pair of a data set that contains the clean image; None without clean images.
    """

    name: str
    derained: Path
    clean: Path | Pair | None

    @property
    def sequence(self) -> str:
        """Name of the video of a data set that the clean image is a frame of; empty for any other image."""
        return self.clean.sequence if isinstance(self.clean, Pair) else ""

    def read(self) -> tuple[Pixels, Pixels | None]:
        """Read both images.

        Returns:
            Derained and clean pixels, ``(h, w, 3)`` in 0 to 255 each; the clean ones are None if there is no clean
            image.

        Raises:
            DerainError: If a file cannot be read, or the sizes differ.
        """
        derained = read_rgb(self.derained)
        if self.clean is None:
            return derained, None
        if isinstance(self.clean, Pair):
            file = self.clean.clean
            _, clean = self.clean.read()
        else:
            file = self.clean
            clean = read_rgb(self.clean)
        if clean is not None and derained.shape != clean.shape:
            derained_size, clean_size = (f"{image.shape[1]}x{image.shape[0]}" for image in (derained, clean))
            raise DerainError(
                f"{self.derained}: is {derained_size}, but the clean image {file} is {clean_size}; "
                "score derained images of the same size as the clean ones"
            )
        return derained, clean


class _Candidate(NamedTuple):
    """Clean images that the derained images may belong to.

    Attributes:
        title: ``SET, SPLIT``, and the notes after ``; `` each; empty for a plain folder.
        references: Clean images by name.
    """

    title: str
    references: References


def find_scoring_pairs(derained: Path, clean: str | None) -> list[ScoringPair]:
    """Return each derained image with its clean image, found by name as in `match_names`.

    If both arguments are files, they are a pair regardless of their names. If ``clean`` is a data set, name, split and
    notes of the data set are printed to standard error.

    Args:
        derained: Derained image, or folder of derained images.
        clean: Clean image, folder of clean images, or data set; None for scores without reference.

    Raises:
        DerainError: If a file or folder does not exist, a folder has no images, ``clean`` is a file and ``derained`` a
            folder, an image has no partner, or names are ambiguous. If ``derained`` is a file, clean images may lack a
            partner.
    """
    if derained.is_file():
        files = {derained.stem: derained}
    elif derained.is_dir():
        files = _images_by_name(derained)
    else:
        raise DerainError(f"{derained}: no such file or folder; give the folder of derained images")
    if clean is None:
        return [ScoringPair(name, file, None) for name, file in files.items()]
    if Path(clean).is_file():
        if derained.is_file():
            return [ScoringPair(derained.stem, derained, Path(clean))]
        raise DerainError(f"{clean}: is a file, but {derained} is a folder; give the folder of clean images")
    labels = (str(derained), clean)
    candidates = _candidates(clean, next(iter(files.values())))
    candidate, clean_names = _best_candidate(list(files), candidates, labels, allow_extra=derained.is_file())
    if candidate.title:
        print(f"clean images: {candidate.title}", file=sys.stderr)
    return [ScoringPair(name, file, candidate.references[clean_names[name]]) for name, file in files.items()]


def _best_candidate(
    names: Sequence[str], candidates: Sequence[_Candidate], labels: tuple[str, str], *, allow_extra: bool
) -> tuple[_Candidate, dict[str, str]]:
    """Return the candidate whose names match by the strictest rule, and the clean name of each derained name.

    Raises:
        DerainError: If no candidate matches, several match by the strictest rule, or a derained name matches several
            clean names.
    """
    fits = []
    for candidate in candidates:
        fit = _fit(names, list(candidate.references), allow_extra)
        if fit is not None:
            fits.append((candidate, fit))
    if not fits:
        raise DerainError(_mismatch(names, list(candidates[0].references), labels))
    strictest_rule = min(fit.rule for _, fit in fits)
    fits = [(candidate, fit) for candidate, fit in fits if fit.rule == strictest_rule]
    if len(fits) > 1:
        titles = " and ".join(candidate.title.partition(";")[0] for candidate, _ in fits)
        raise DerainError(f"{labels[0]}: matches images of {titles} in {labels[1]}; give the folder of one of them")
    candidate, fit = fits[0]
    return candidate, fit.unique(labels, allow_extra)


def _images_by_name(folder: Path) -> dict[str, Path]:
    """Return the images in a folder by name without suffix, or those in its subfolders if it contains none directly.

    Names of images in subfolders are relative to the deepest folder that contains all images. Comparisons and
    explanations of other images are omitted.

    Raises:
        DerainError: If there are no images, or two have the same name.
    """
    paths = image_files(folder)
    if paths:
        below = len(list_images(folder, recursive=True).files) - len(paths)
        if below:
            warn_once(f"{folder}: {below} images in subfolders are ignored; give a subfolder to use its images")
    else:
        paths = image_files(folder, recursive=True)
    if not paths:
        raise DerainError(f"{folder}: contains no images; expected PNG, JPEG, WebP, AVIF, TIFF or BMP files")
    files: dict[str, Path] = {}
    top = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        name = path.relative_to(top).with_suffix("").as_posix()
        if name in files:
            raise DerainError(f"{path}: has the same name as {files[name].name}; remove one of them")
        files[name] = path
    # `derain restore` and `derain predict` write comparisons and explanations to the same folder.
    companions = set()
    for path in files.values():
        companions |= {f"{path.name}-compare", f"{path.name}-explain", f"{path.stem}-explain"}
    return {name: path for name, path in files.items() if name.rpartition("/")[2] not in companions}


def _candidates(clean: str, derained_file: Path) -> list[_Candidate]:
    """Return the clean images of each split of a data set, or those of a plain folder."""
    candidates: list[_Candidate] = []
    first_error = None
    for split in SPLITS:
        try:
            pair_set = find_pairs(clean, split)
        except DerainError as error:
            first_error = first_error or error
            continue
        first = pair_set.pairs[0]
        # A file with the size of a derained image is not two images side by side.
        if first.clean_side and image_size(first.rainy) == image_size(derained_file):
            return [_plain_folder(clean)]
        references: References = {pair.name: pair for pair in pair_set.pairs}
        if all(references != candidate.references for candidate in candidates):
            title = "; ".join([f"{pair_set.name}, {split}", *pair_set.notes])
            candidates.append(_Candidate(title, references))
    if candidates:
        return candidates
    if first_error is not None and not Path(clean).is_dir():
        raise first_error
    return [_plain_folder(clean)]


def _plain_folder(clean: str) -> _Candidate:
    return _Candidate("", dict(_images_by_name(Path(clean))))


def match_names(
    derained: Sequence[str],
    clean: Sequence[str],
    *,
    allow_extra: bool = False,
    labels: tuple[str, str] = ("DERAINED", "CLEAN"),
) -> dict[str, str]:
    """Return the clean name of every derained name, found by the names alone, never by their order.

    Names are compared in Unicode's composed form (NFC), by the first of these rules that fits all names:

    1. Equal names.
    2. Equal except for case, punctuation, leading zeros, words for the kind of an image, and a final scale:
       ``rain-001`` equals ``norain-1x2`` and ``1_derained``.
    3. As rule 2, after removing a prefix and a suffix that all derained names share; or, unless ``allow_extra``, the
       final number of each derained name (``901_1``, ``901_2``), so that several may have the same clean name. If
       several removals fit, they must agree.

    Args:
        derained: Names of the derained images, without suffix; at least one.
        clean: Names of the clean images, without suffix.
        allow_extra: Allow clean names without a derained name.
        labels: Names of both lists in messages.

    Raises:
        DerainError: If no rule fits all names, or a derained name matches several clean names.

    Example:
        >>> match_names(["rain-1", "rain-2"], ["norain-001", "norain-002"])
        {'rain-1': 'norain-001', 'rain-2': 'norain-002'}
        >>> match_names(["901_1", "901_2", "902_1"], ["901", "902"])
        {'901_1': '901', '901_2': '901', '902_1': '902'}
        >>> match_names(["scene_3_12"], ["3", "12"], allow_extra=True)
        Traceback (most recent call last):
        derain.errors.DerainError: DERAINED: scene_3_12 matches several images of CLEAN: 3, 12; give the clean file
    """
    fit = _fit(derained, clean, allow_extra)
    if fit is None:
        raise DerainError(_mismatch(derained, clean, labels))
    return fit.unique(labels, allow_extra)


@dataclass(frozen=True)
class _Fit:
    """Clean names that match each derained name, by the strictest rule that fits all names.

    Attributes:
        rule: Index of the rule in `match_names`, from 0; a lower one is stricter.
        options: Clean names by derained name.
    """

    rule: int
    options: dict[str, list[str]]

    def unique(self, labels: tuple[str, str], allow_extra: bool) -> dict[str, str]:
        """Return the clean name of each derained name.

        Raises:
            DerainError: If a derained name matches several clean names.
        """
        for name, clean_names in self.options.items():
            if len(clean_names) > 1:
                remedy = "give the clean file" if allow_extra else "rename them"
                raise DerainError(
                    f"{labels[0]}: {name} matches several images of {labels[1]}: {_first(clean_names)}; {remedy}"
                )
        return {name: clean_names[0] for name, clean_names in self.options.items()}


def _fit(derained: Sequence[str], clean: Sequence[str], allow_extra: bool) -> _Fit | None:
    """Return the names that match by the first rule of `match_names` that fits all; None if no rule does."""
    keys = [_key(name) for name in derained]
    clean_by_name, clean_by_key = _by_key(clean, _composed), _by_key(clean, _key)
    equal = _look_up(derained, [_composed(name) for name in derained], clean_by_name, allow_extra)
    equal_keys = _look_up(derained, keys, clean_by_key, allow_extra)
    trimmed = [
        _look_up(derained, trimmed_keys, clean_by_key, allow_extra) for trimmed_keys in _trimmed(keys, clean_by_key)
    ]
    numbered = all(len(key) > 1 and key[-1].isdecimal() for key in keys)
    if not allow_extra and numbered and len(set(keys)) == len(keys):
        unnumbered = [key[:-1] for key in keys]
        trimmed.append(_look_up(derained, unnumbered, clean_by_key, allow_extra, allow_repeated=True))
    for rule, results in enumerate(([equal], [equal_keys], trimmed)):
        matches = [result for result in results if result is not None]
        if matches:
            return _Fit(rule, {name: _union(match[name] for match in matches) for name in derained})
    return None


def _union(lists: Iterable[list[str]]) -> list[str]:
    """Return the distinct items of several lists, in order."""
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def _trimmed(keys: Sequence[Key], clean: dict[Key, list[str]]) -> list[list[Key]]:
    """Return the keys without a shared prefix and suffix, for each choice that makes the first key one of ``clean``."""
    first = keys[0]
    trimmed = []
    for start in range(len(first)):
        for stop in range(len(first), start, -1):
            if first[start:stop] not in clean:
                continue
            prefix, suffix = first[:start], first[stop:]
            if all(key[:start] == prefix and key[len(key) - len(suffix) :] == suffix for key in keys):
                trimmed.append([key[start : len(key) - len(suffix)] for key in keys])
    return trimmed


def _look_up(
    derained: Sequence[str],
    keys: Sequence[K],
    clean: dict[K, list[str]],
    allow_extra: bool,
    *,
    allow_repeated: bool = False,
) -> dict[str, list[str]] | None:
    """Return the clean names by derained name; None if the keys of the derained names do not fit.

    Keys fit if each is a key of ``clean``, no other key of ``clean`` remains (unless ``allow_extra``), and no key
    repeats (unless ``allow_repeated``).
    """
    distinct = set(keys)
    if not distinct <= clean.keys():
        return None
    if not allow_extra and len(distinct) != len(clean):
        return None
    if not allow_repeated and len(distinct) != len(keys):
        return None
    return {name: clean[key] for name, key in zip(derained, keys, strict=True)}


_KIND_WORDS = frozenset(
    re.findall(
        r"\w+",
        "rain rainy input lq norain clean gt groundtruth ground truth target hq "
        "derain derained deraining output out result results restored pred sr",
    )
)
"""Words for the kind of an image (rainy, clean, derained), which do not identify its pair."""


_WORD_CATEGORIES = ("L", "M", "N", "So", "Cs")
"""Unicode categories of letters, marks, numbers, pictographs, and bytes that are not UTF-8."""


def _composed(name: str) -> str:
    """Return a name in Unicode's composed form, since file systems and archives differ in how they write accents."""
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> Key:
    """Return the words and numbers of a name, without leading zeros, words for its kind, and a final scale (``x2``).

    Letters and signs of any script, and bytes that are not UTF-8, belong to words; punctuation and spaces separate
    words.
    """
    plain = re.sub(r"(?<=\d)x\d$", "", _composed(name.lower()))
    spaced = "".join(char if unicodedata.category(char).startswith(_WORD_CATEGORIES) else " " for char in plain)
    key = []
    for part in re.findall(r"\d+|[^\d\s]+", spaced):
        if part.isdecimal():
            key.append(part.lstrip("0") or "0")
        elif part not in _KIND_WORDS:
            key.append(part)
    return tuple(key)


def _by_key(names: Sequence[str], key: Callable[[str], K]) -> dict[K, list[str]]:
    groups: dict[K, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return dict(groups)


def _mismatch(derained: Sequence[str], clean: Sequence[str], labels: tuple[str, str]) -> str:
    """Return the error message for names that no rule matches."""
    derained_by_key, clean_by_key = _by_key(derained, _key), _by_key(clean, _key)
    for groups, label in ((derained_by_key, labels[0]), (clean_by_key, labels[1])):
        for names in groups.values():
            if len(names) > 1:
                return f"{label}: {_first(names)} have the same numbers and words; give the images distinct names"
    extra = [names[0] for key, names in derained_by_key.items() if key not in clean_by_key]
    missing = [names[0] for key, names in clean_by_key.items() if key not in derained_by_key]
    problems = []
    if extra:
        problems.append(f"{labels[0]}: no clean image for {_first(extra)}")
    if missing:
        problems.append(f"{labels[1]}: no derained image for {_first(missing)}")
    return f"{'; '.join(problems)}; rename, add or remove files so that every image has a partner"


def _first(names: list[str]) -> str:
    """Return the first five names and the number of remaining ones as text."""
    listed = ", ".join(names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"
