"""Which derained image belongs to which clean one, by the names of their files."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derain.data.pairs import Pair, find_pairs
from derain.errors import DerainError
from derain.images import Pixels, image_files, image_size, read_rgb


@dataclass(frozen=True)
class Job:
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


def find_jobs(derained: Path, clean: str | None) -> list[Job]:
    """Finds which clean image belongs to which derained one, by name.

    Raises:
        DerainError: If files are absent, or names do not tell which belong together.
    """
    if derained.is_file():
        files = {derained.stem: derained}
    elif derained.is_dir():
        files = _images(derained)
    else:
        raise DerainError(f"{derained}: no such file or folder; give the folder of derained images")
    if clean is None:
        return [Job(name, file, None) for name, file in files.items()]
    if Path(clean).is_file():
        if derained.is_file():
            return [Job(derained.stem, derained, Path(clean))]
        raise DerainError(f"{clean}: is one file, but {derained} is a folder; give the folder of clean images")
    references = _references(clean, derained if derained.is_file() else next(iter(files.values())))
    found = match(list(files), list(references), part=derained.is_file(), where=(str(derained), clean))
    return [Job(name, files[name], references[found[name]]) for name in files]


def _images(folder: Path) -> dict[str, Path]:
    """Images by name without ending: of the folder itself, or where it has none, of the folders below."""
    paths = image_files(folder) or image_files(folder, recursive=True)
    if not paths:
        raise DerainError(f"{folder}: holds no images; expected PNG, JPEG, WebP, TIFF, BMP or AVIF files")
    files: dict[str, Path] = {}
    top = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        name = path.relative_to(top).with_suffix("").as_posix()
        if name in files:
            raise DerainError(f"{path}: goes by the same name as {files[name].name}; remove one of them")
        files[name] = path
    # What `derain restore --compare` writes beside its results is no result.
    beside = {f"{path.name}-compare" for path in files.values()}
    return {name: path for name, path in files.items() if name not in beside}


def _references(clean: str, derained: Path) -> dict[str, Path | Pair]:
    """Clean images by name: of a data set where it is one, else of a plain folder."""
    problem = None
    for split in ("test", "train"):
        try:
            found = find_pairs(clean, split)
        except DerainError as error:
            problem = problem or error
            continue
        pair = found.pairs[0]
        if pair.clean_side and image_size(pair.rainy) == image_size(derained):
            break  # not side by side after all
        print(f"clean images: {found.name}, {split}; {'; '.join(found.notes)}".rstrip("; "), file=sys.stderr)
        return {pair.name: pair for pair in found.pairs}
    if problem is not None and not Path(clean).is_dir():
        raise problem
    return dict(_images(Path(clean)))


def match(
    derained: Sequence[str],
    clean: Sequence[str],
    *,
    part: bool = False,
    where: tuple[str, str] = ("DERAINED", "CLEAN"),
) -> dict[str, str]:
    """Finds the clean image of every derained one by name, never by position.

    Tried in turn, each for all images at once: the same name; the same but for the usual words (``rain-001``,
    ``norain-1x2``, ``1_derained``) and zeros; the same but for one prefix and suffix that all results share;
    one clean image for several results numbered ``901_1``, ``901_2``.

    Args:
        derained: Names of the results, without ending.
        clean: Names of the clean images.
        part: Whether clean images may be left over.
        where: What messages call the two.

    Raises:
        DerainError: If an image is left over on either side, or fits several.

    Example:
        >>> match(["rain-1", "rain-2"], ["norain-001", "norain-002"])
        {'rain-1': 'norain-001', 'rain-2': 'norain-002'}
        >>> match(["901_1", "901_2", "902_1"], ["901", "902"])
        {'901_1': '901', '901_2': '901', '902_1': '902'}
    """
    plain = _by_key(clean, _key)
    words = [_key(name) for name in derained]
    tries: list[tuple[list[Any], dict[Any, list[str]]]] = [(list(derained), {name: [name] for name in clean})]
    tries.append((words, plain))
    first = words[0]
    for start, stop in ((i, j) for i in range(len(first)) for j in range(len(first), i, -1)):
        before, after = first[:start], first[stop:]
        if first[start:stop] in plain and all(
            key[:start] == before and key[len(key) - len(after) :] == after for key in words
        ):
            tries.append(([key[start : len(key) - len(after)] for key in words], plain))
    for keys, known in tries:
        covered = part or len(set(keys)) == len(known)
        if covered and len(set(keys)) == len(keys) and all(len(known.get(key, ())) == 1 for key in keys):
            return {name: known[key][0] for name, key in zip(derained, keys, strict=True)}
    several = [key[:-1] for key in words]
    if len(set(words)) == len(words) and all(len(key) > 1 and key[-1].isdigit() for key in words):
        covered = part or set(several) == set(plain)
        if covered and all(len(plain.get(key, ())) == 1 for key in several):
            return {name: plain[key][0] for name, key in zip(derained, several, strict=True)}
    raise DerainError(_mismatch(_by_key(derained, _key), plain, where))


_USUAL = frozenset(
    re.findall(
        r"\w+",
        "rain rainy input lq norain clean gt groundtruth ground truth target hq "
        "derain derained deraining output out result results restored pred sr",
    )
)
"""Words that say which side of a pair an image is on, not which pair."""


def _key(name: str) -> tuple[str, ...]:
    """The words and numbers of a name that say which image it is."""
    parts = re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=\d)x\d$", "", name.lower()))
    return tuple(part.lstrip("0") or "0" if part.isdigit() else part for part in parts if part not in _USUAL)


def _by_key(names: Sequence[str], key: Callable[[str], tuple[str, ...]]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def _mismatch(
    derained: dict[tuple[str, ...], list[str]],
    clean: dict[tuple[str, ...], list[str]],
    where: tuple[str, str],
) -> str:
    """One line that names the files that do not pair."""
    for names, place in ((derained, where[0]), (clean, where[1])):
        for several in names.values():
            if len(several) > 1:
                return f"{place}: names do not tell {_some(several)} apart; give the images their own names"
    extra = [name for key, (name,) in derained.items() if key not in clean]
    missing = [name for key, (name,) in clean.items() if key not in derained]
    told = []
    if extra:
        told.append(f"{where[0]}: no clean image for {_some(extra)}")
    if missing:
        told.append(f"{where[1]}: no derained image for {_some(missing)}")
    return f"{'; '.join(told)}; rename, add or remove files so that every image has its partner"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
