"""Folders: the cache, and outputs that must not overwrite each other."""

import os
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from derain.errors import DerainError


def cache_folder() -> Path:
    """``$DERAIN_CACHE``, else the system's cache folder."""
    return Path(os.environ.get("DERAIN_CACHE") or platformdirs.user_cache_dir("derain", appauthor=False))


def check_outputs(outputs: Iterable[tuple[Path, object]]) -> None:
    """Refuse outputs of which one would overwrite another, or be a file where another needs a folder.

    Args:
        outputs: Each file that is to be written, and what it is made from.

    Raises:
        DerainError: If there are any.

    Example:
        >>> check_outputs([(Path("out/a.png"), "a.jpg"), (Path("out/a.png"), "a.bmp")])
        Traceback (most recent call last):
        derain.errors.DerainError: out/a.png: is the output of both a.jpg and a.bmp; rename one of them
    """
    sources: dict[Path, object] = {}
    for target, source in outputs:
        if target in sources:
            raise DerainError(f"{target}: is the output of both {sources[target]} and {source}; rename one of them")
        sources[target] = source
    for target, source in sources.items():
        folder = next((parent for parent in target.parents if parent in sources), None)
        if folder is not None:
            raise DerainError(
                f"{folder}: is the output of {sources[folder]} and the folder of {source}'s; rename one of them"
            )
