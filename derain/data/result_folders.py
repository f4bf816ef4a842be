"""Which derained image belongs to which clean one, by the names of their files."""

import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from derain.data.layouts import Split
from derain.data.pairs import Pair, find_pairs
from derain.errors import DerainError
from derain.images import Pixels, image_files, image_size, list_images, read_rgb, warn_once

SPLITS: tuple[Split, ...] = ("test", "train")

Key = tuple[str, ...]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class ScoringPair:
    """A derained image and its clean one.

    Attributes:
        name: What the image is called in results.
        derained: Its file.
        clean: The clean image: a file, or half of a pair's file.
    """

    name: str
    derained: Path
    clean: Path | Pair | None

    def read(self) -> tuple[Pixels, Pixels | None]:
        """Reads both.

        Raises:
            DerainError: If a file cannot be read, or the sizes differ.
        """
        derained = read_rgb(self.derained)
        if self.clean is None:
            return derained, None
        clean = self.clean.read()[1] if isinstance(self.clean, Pair) else read_rgb(self.clean)
        if clean is not None and derained.shape != clean.shape:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (derained, clean)]
            file = self.clean.clean if isinstance(self.clean, Pair) else self.clean
            raise DerainError(
                f"{self.derained}: is {sizes[0]}, but the clean image {file} is {sizes[1]}; "
                "score results of the clean images' size"
            )
        return derained, clean


def find_scoring_pairs(derained: Path, clean: str | None) -> list[ScoringPair]:
    """Find which clean image belongs to which derained one, by name.

    Raises:
        DerainError: If files are absent, or names leave open which belong together.
    """
    if derained.is_file():
        files = {derained.stem: derained}
    elif derained.is_dir():
        files = _images(derained)
    else:
        raise DerainError(f"{derained}: no such file or folder; give the folder of derained images")
    if clean is None:
        return [ScoringPair(name, file, None) for name, file in files.items()]
    if Path(clean).is_file():
        if derained.is_file():
            return [ScoringPair(derained.stem, derained, Path(clean))]
        raise DerainError(f"{clean}: is one file, but {derained} is a folder; give the folder of clean images")
    names, part, where = list(files), derained.is_file(), (str(derained), clean)
    candidates = _references(clean, derained if part else next(iter(files.values())))
    fits = [
        (title, references, fit) for title, references in candidates if (fit := _fit(names, list(references), part))
    ]
    if not fits:
        raise DerainError(_mismatch(names, list(candidates[0][1]), where))
    strictest = min(fit.step for _, _, fit in fits)
    fits = [one for one in fits if one[2].step == strictest]
    if len(fits) > 1:
        titles = " and ".join(title.partition(";")[0] for title, _, _ in fits)
        raise DerainError(f"{derained}: fits images of {titles} in {clean}; give the folder of one of them")
    ((title, references, fit),) = fits
    found = fit.only(where, part)
    if title:
        print(f"clean images: {title}", file=sys.stderr)
    return [ScoringPair(name, file, references[found[name]]) for name, file in files.items()]


def _images(folder: Path) -> dict[str, Path]:
    """Images by name without ending: of the folder itself, or where it has none, of the folders below."""
    paths = image_files(folder)
    if paths:
        below = len(list_images(folder, recursive=True).files) - len(paths)
        if below:
            warn_once(f"{folder}: {below} images in folders below it are not scored; give those folders by themselves")
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
    # What `derain restore` and `derain predict` write beside their results are no results.
    beside = {f"{path.name}-{what}" for path in files.values() for what in ("compare", "explain")}
    beside |= {f"{path.stem}-explain" for path in files.values()}
    return {name: path for name, path in files.items() if name.rpartition("/")[2] not in beside}


def _references(clean: str, derained: Path) -> list[tuple[str, dict[str, Path | Pair]]]:
    """Return title and clean images by name: of each split of a data set where it is one, else of a plain folder."""
    sets: list[tuple[str, dict[str, Path | Pair]]] = []
    problem = None
    for split in SPLITS:
        try:
            found = find_pairs(clean, split)
        except DerainError as error:
            problem = problem or error
            continue
        pair = found.pairs[0]
        if pair.clean_side and image_size(pair.rainy) == image_size(derained):
            return [("", dict(_images(Path(clean))))]  # not side by side after all
        references: dict[str, Path | Pair] = {pair.name: pair for pair in found.pairs}
        if all(references != other for _, other in sets):
            sets.append(("; ".join([f"{found.name}, {split}", *found.notes]), references))
    if not sets and problem is not None and not Path(clean).is_dir():
        raise problem
    return sets or [("", dict(_images(Path(clean))))]


def match_names(
    derained: Sequence[str],
    clean: Sequence[str],
    *,
    part: bool = False,
    where: tuple[str, str] = ("DERAINED", "CLEAN"),
) -> dict[str, str]:
    """Find the clean image of every derained one by name, never by position.

    Tried in turn, each for all images at once, in Unicode's composed form (NFC): the same name; the same but for the
    usual words (``rain-001``, ``norain-1x2``, ``1_derained``) and zeros; then the looser readings: the same but for
    one prefix and suffix that all results share, and one clean image for several results numbered ``901_1``, ``901_2``.
    The looser readings must agree.

    Args:
        derained: Names of the results, without ending.
        clean: Names of the clean images.
        part: Whether clean images may be left over.
        where: What messages call the two.

    Raises:
        DerainError: If an image is left over on either side, or fits several.

    Example:
        >>> match_names(["rain-1", "rain-2"], ["norain-001", "norain-002"])
        {'rain-1': 'norain-001', 'rain-2': 'norain-002'}
        >>> match_names(["901_1", "901_2", "902_1"], ["901", "902"])
        {'901_1': '901', '901_2': '901', '902_1': '902'}
        >>> match_names(["scene_3_12"], ["3", "12"], part=True)
        Traceback (most recent call last):
        derain.errors.DerainError: DERAINED: scene_3_12 fits several images of CLEAN: 3, 12; give the clean file
    """
    fit = _fit(derained, clean, part)
    if fit is None:
        raise DerainError(_mismatch(derained, clean, where))
    return fit.only(where, part)


@dataclass(frozen=True)
class _Fit:
    """What the strictest reading of names that fits makes of them.

    Attributes:
        step: Which reading it is, 0 the strictest.
        options: Clean images that fit each result.
    """

    step: int
    options: dict[str, list[str]]

    def only(self, where: tuple[str, str], part: bool) -> dict[str, str]:
        """Return the one clean image of each result.

        Raises:
            DerainError: If a result has several.
        """
        for name, fitting in self.options.items():
            if len(fitting) > 1:
                several = f"{name} fits several images of {where[1]}: {_some(fitting)}"
                raise DerainError(f"{where[0]}: {several}; {'give the clean file' if part else 'rename them'}")
        return {name: fitting for name, (fitting,) in self.options.items()}


def _fit(derained: Sequence[str], clean: Sequence[str], part: bool) -> _Fit | None:
    """Return the strictest reading of the names that `match` describes and that fits, if any does."""
    exact, words = [_composed(name) for name in derained], [_key(name) for name in derained]
    by_name, by_words = _by_key(clean, _composed), _by_key(clean, _key)
    steps: list[list[dict[str, list[str]]]] = [
        _reading(derained, exact, by_name, part),
        _reading(derained, words, by_words, part),
        [fit for keys in _middles(words, by_words) for fit in _reading(derained, keys, by_words, part)],
    ]
    if not part and len(set(words)) == len(words) and all(len(key) > 1 and key[-1].isdecimal() for key in words):
        steps[-1] += _reading(derained, [key[:-1] for key in words], by_words, part, repeated=True)
    for step, readings in enumerate(steps):
        if readings:
            options = {name: list(dict.fromkeys(one for fit in readings for one in fit[name])) for name in derained}
            return _Fit(step, options)
    return None


def _middles(words: Sequence[Key], known: dict[Key, list[str]]) -> list[list[Key]]:
    """Return what is left of all results without one prefix and one suffix that they share, where it is known."""
    first = words[0]
    found = []
    for start, stop in ((i, j) for i in range(len(first)) for j in range(len(first), i, -1)):
        before, after = first[:start], first[stop:]
        if first[start:stop] in known and all(
            key[:start] == before and key[len(key) - len(after) :] == after for key in words
        ):
            found.append([key[start : len(key) - len(after)] for key in words])
    return found


def _reading(
    derained: Sequence[str], keys: Sequence[K], known: dict[K, list[str]], part: bool, *, repeated: bool = False
) -> list[dict[str, list[str]]]:
    """Return the clean images of every result, or nothing if some have none, or clean images or keys are left over."""
    distinct = set(keys)
    if not distinct <= known.keys() or (not part and len(distinct) != len(known)):
        return []
    if not repeated and len(distinct) != len(keys):
        return []
    return [{name: known[key] for name, key in zip(derained, keys, strict=True)}]


_USUAL = frozenset(
    re.findall(
        r"\w+",
        "rain rainy input lq norain clean gt groundtruth ground truth target hq "
        "derain derained deraining output out result results restored pred sr",
    )
)
"""Words that say which side of a pair an image is on, not which pair."""


_WORDS = ("L", "M", "N", "So", "Cs")
"""Unicode's categories of letters, marks, numbers, pictographs, and bytes that are not UTF-8."""


def _composed(name: str) -> str:
    """Return a name in Unicode's composed form: file systems and archives differ in how they write accents."""
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> Key:
    """Return the words and numbers of a name that say which image it is.

    Accents, signs of any script, and bytes that are not UTF-8 belong to words; punctuation and spaces separate them.
    """
    plain = re.sub(r"(?<=\d)x\d$", "", _composed(name.lower()))
    spaced = "".join(char if unicodedata.category(char).startswith(_WORDS) else " " for char in plain)
    parts = re.findall(r"\d+|[^\d\s]+", spaced)
    return tuple(part.lstrip("0") or "0" if part.isdecimal() else part for part in parts if part not in _USUAL)


def _by_key(names: Sequence[str], key: Callable[[str], K]) -> dict[K, list[str]]:
    found: dict[K, list[str]] = defaultdict(list)
    for name in names:
        found[key(name)].append(name)
    return dict(found)


def _mismatch(derained: Sequence[str], clean: Sequence[str], where: tuple[str, str]) -> str:
    """Return one line that names the files that do not pair."""
    results, references = _by_key(derained, _key), _by_key(clean, _key)
    for names, folder in ((results, where[0]), (references, where[1])):
        for several in names.values():
            if len(several) > 1:
                return f"{folder}: {_some(several)} have the same numbers and words; give the images distinct names"
    extra = [name for key, (name,) in results.items() if key not in references]
    missing = [name for key, (name,) in references.items() if key not in results]
    problems = []
    if extra:
        problems.append(f"{where[0]}: no clean image for {_some(extra)}")
    if missing:
        problems.append(f"{where[1]}: no derained image for {_some(missing)}")
    return f"{'; '.join(problems)}; rename, add or remove files so that every image has its partner"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
