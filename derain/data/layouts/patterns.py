"""File patterns of data sets.

A pattern is a regular expression for the path of a file relative to the data set's folder, without suffix, with ``/``
between folders; case is ignored. The values of the named groups, except ``version``, are the key of a file: a rainy and
a clean file with equal keys form a pair.

- ``{n}``: a number (``007`` equals ``7``);
- ``{name}``: any text, including folders;
- ``{sequence}`` and ``{frame}``: any text without folders, such as the folder of a video and the name of its frame;
- ``{version}``: number of the rainy version if a clean image has several. If the versions have names instead of
  numbers, the pattern has a group ``(?P<version>...)`` of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "test", "predict"]
"""Part of a data set; ``predict`` has rainy images without clean ones."""

Side = Literal["left", "right"]
"""Half of a file with a rainy and a clean image side by side."""

PLACEHOLDERS: Mapping[str, str] = {
    "{n}": r"(?P<n>\d+)",
    "{name}": "(?P<name>.+?)",
    "{sequence}": "(?P<sequence>[^/]+)",
    "{frame}": "(?P<frame>[^/]+)",
    "{version}": r"(?P<version>\d+)",
}
"""Regular expressions of the placeholders in patterns."""

SPLIT_FOLDERS: Mapping[str, str] = {"train": "train|training", "test": "test|testing"}
"""Patterns of the folder that may contain a split; each file pattern is tried below this folder, then without it."""

AUXILIARY = r"(?:.*/)?(?:rainregion|rainstreak|raintrainregion|rain_?mask|streak)(?:[-_/].*)?"
"""Pattern of rain masks and streaks, which some archives contain; such files are ignored unless ``Files.auxiliary``."""


@dataclass(frozen=True)
class Files:
    """File patterns of one split of a data set, or of one variant of it.

    Attributes:
        rainy: Pattern of the rainy files.
        clean: Pattern of the clean files; None if a file has both images side by side, or there are no clean images.
        clean_side: Clean half of side-by-side files; None if rainy and clean images are in separate files.
        numbers: First and last ``{n}`` of the split; None for all.
        truth: Whether the clean half is ground truth (some side-by-side files contain a real photo twice).
        auxiliary: Whether rainy files may have names that match :data:`AUXILIARY`.
        video: Whether each folder of rainy files is a video, with its frames in natural order of their names.
        note: What users should know about this variant of the data set.
    """

    rainy: str
    clean: str | None = None
    clean_side: Side | None = None
    numbers: tuple[int, int] | None = None
    truth: bool = True
    auxiliary: bool = False
    video: bool = False
    note: str = ""

    def __str__(self) -> str:
        """Return the patterns in readable form, without optional parts.

        Example:
            >>> from derain.data.layouts import LAYOUTS
            >>> str(LAYOUTS["Rain100L"].files["test"][1])
            'rain/rain-{n} with norain/norain-{n}'
            >>> str(LAYOUTS["Rain800"].files["train"][0])
            'training/{n} (clean left, rainy right)'
        """
        if self.clean is not None:
            return f"{_plain(self.rainy)} with {_plain(self.clean)}"
        if self.clean_side is None:
            return _plain(self.rainy)
        order = "clean left, rainy right" if self.clean_side == "left" else "rainy left, clean right"
        return f"{_plain(self.rainy)} ({order})"


def _plain(pattern: str) -> str:
    """Return a pattern in readable form: first alternatives, no optional parts or negative lookaheads."""
    plain = pattern.replace(r"\d+", "{n}").replace("(?P=video)", "{n}").replace("[-_]?", "-")
    plain = plain.replace("[^/]+", "{name}")
    previous = ""
    while plain != previous:  # groups are nested: each pass resolves the innermost ones
        previous = plain
        plain = re.sub(r"\(\?![^()]*\)", "", plain)
        plain = re.sub(r"\(\?(?::|P<\w+>)[^()]*\)\?", "", plain)
        plain = re.sub(r"\(\?(?::|P<\w+>)([^()|]*)[^()]*\)(?!\?)", r"\1", plain)
    return re.sub(r"\w\?", "", plain)


@dataclass(frozen=True)
class Layout:
    """Layout of a data set, or a general layout of pairs.

    Attributes:
        title: Description in one line.
        source: Download page; empty for general layouts.
        citation: Paper; empty for general layouts.
        folders: Names of the data set's folder below the data root; empty for general layouts.
        files: Variants of the file patterns by split; the first one that matches is used.
        counts: Number of pairs (of images for ``predict``) in the authors' download by split, without excluded pairs; a
            split whose number could not be confirmed is missing.
        excluded_test_set: Name of a test set; training pairs that show one of its backgrounds are excluded. None for
            no exclusion.
        partner: Data set with the split that this one lacks: the training pairs for a test set, or a test set for
            training pairs.
        protocols: How papers compute their scores on the test set: names in :data:`derain.metrics.PROTOCOLS`, or what
            differs from all of them; empty if it could not be confirmed.
        remarks: Known faults, and what else to know before training or testing on the set.
    """

    title: str
    files: Mapping[Split, tuple[Files, ...]]
    source: str = ""
    citation: str = ""
    folders: tuple[str, ...] = ()
    counts: Mapping[Split, int] = field(default_factory=dict)
    excluded_test_set: str | None = None
    partner: str = ""
    protocols: str = ""
    remarks: tuple[str, ...] = ()


RAINY_FOLDER = "(?:inputs?|rain|rainy|rainy_images?|lq)"
"""Pattern of common names of a folder of rainy images."""

CLEAN_FOLDER = "(?:targets?|norain|clean|gt|ground_?truth)"
"""Pattern of common names of a folder of clean images."""

FOLDERS = Files(f"{RAINY_FOLDER}/{{name}}", f"{CLEAN_FOLDER}/{{name}}")
"""Pairs of equal names in two folders."""
