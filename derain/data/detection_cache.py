"""Cache of the paired files of large folders, since pairing is slow: it sorts and matches every file name."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derain.data.file_hashes import load_computed, save_computed, states_digest
from derain.data.layouts import LAYOUTS, Files, Split
from derain.data.name_matching import PairedFiles
from derain.image_sources import ImageFile

CACHED_FROM = 5000
"""Number of images in a folder from which its pairs are cached."""

DAMAGED = (TypeError, ValueError, KeyError, IndexError, AttributeError)
"""Exceptions that damaged content can raise."""

Detection = tuple[str, str, PairedFiles]
"""Layout, reason for it (empty for a given layout), and paired files."""


def detection_key(root: Path, split: Split, layout: str | None, files: Sequence[str]) -> list[bytes]:
    """Return everything that the paired files depend on.

    This is the folder, the split, the definitions of all layouts, and the paths of the files. For a given layout, it is
    also the name of the layout; for a detected one, the size, inode and times of each file, since detection reads some
    images.

    Args:
        root: The folder.
        split: Split whose pairs are searched.
        layout: Name of the layout; None if it is detected.
        files: Relative paths of the images below the folder, sorted: the order of a file system may vary.
    """
    folders = [os.fsencode(path) for path in (root, root.absolute(), root.resolve())]
    if layout is None:
        files_digest = states_digest(root, files)
    else:
        files_digest = hashlib.sha256(os.fsencode("\0".join((layout, *files)))).digest()
    # Increment the version when a change of the code alters which files form pairs.
    return [b"pairs, version 2", split.encode(), *folders, repr(LAYOUTS).encode(), files_digest]


def load_detection(key: Sequence[bytes], root: Path, files: Sequence[str]) -> Detection | None:
    """Return a saved detection; None if there is none, or it is damaged.

    Args:
        key: Result of `detection_key`.
        root: The folder.
        files: Relative paths of the images below it, sorted as for `detection_key`.
    """
    content = load_computed(key)
    if content is None:
        return None
    paths = _paths(root, files)
    try:
        variants = _variants(content["layout"])
        return (
            content["layout"],
            str(content["reason"]),
            PairedFiles(
                pairs=tuple(
                    (str(name), paths[rainy], None if clean is None else paths[clean])
                    for name, rainy, clean in content["pairs"]
                ),
                unpaired=tuple(paths[index] for index in content["unpaired"]),
                variant=variants[content["variant"]],
                unused=tuple((variants[index], int(count)) for index, count in content["unused"]),
            ),
        )
    except DAMAGED:
        return None


def save_detection(key: Sequence[bytes], root: Path, files: Sequence[str], detection: Detection) -> None:
    """Save a detection, unless it has clashes or no pairs: the next run then reports this again.

    Args:
        key: Result of `detection_key`.
        root: The folder.
        files: Relative paths of the images below it, sorted as for `detection_key`.
        detection: Layout, reason and paired files.
    """
    layout, reason, paired = detection
    if paired.clashes or not paired.pairs:
        return
    variants = _variants(layout)
    index: dict[ImageFile | None, Any] = {path: number for number, path in enumerate(_paths(root, files))}
    index[None] = None
    content = {
        "layout": layout,
        "reason": reason,
        "pairs": [(pair_name, index[rainy], index[clean]) for pair_name, rainy, clean in paired.pairs],
        "unpaired": [index[file] for file in paired.unpaired],
        "variant": variants.index(paired.variant),
        "unused": [(variants.index(variant), count) for variant, count in paired.unused],
    }
    save_computed(key, content)


def _paths(root: Path, files: Sequence[str]) -> list[Path]:
    """Return the paths of files below a folder."""
    prefix = "" if root == Path() else f"{str(root).rstrip('/')}/"
    return [Path(prefix + file) for file in files]


def _variants(layout: str) -> list[Files]:
    """Return the variants of all splits of a layout."""
    return [variant for variants in LAYOUTS[layout].files.values() for variant in variants]
