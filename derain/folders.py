"""Path of the cache folder, and a check that output files do not overwrite each other."""

import os
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from derain.errors import DerainError


def cache_folder() -> Path:
    """Return ``$DERAIN_CACHE`` if it is set, else derain's folder in the user's cache folder."""
    return Path(os.environ.get("DERAIN_CACHE") or platformdirs.user_cache_dir("derain", appauthor=False))


def check_outputs(outputs: Iterable[tuple[Path, object]]) -> None:
    """Check that no output overwrites another, and that no output file has the path of another output's folder.

    Args:
        outputs: Path of each output file, and the input that it is made from.

    Raises:
        DerainError: If two outputs collide.

    Example:
        >>> check_outputs([(Path("out/a.png"), "a.jpg"), (Path("out/a.png"), "a.bmp")])
        Traceback (most recent call last):
        derain.errors.DerainError: out/a.png: output of both a.jpg and a.bmp; rename one of the inputs
    """
    sources: dict[Path, object] = {}
    for target, source in outputs:
        if target in sources:
            raise DerainError(f"{target}: output of both {sources[target]} and {source}; rename one of the inputs")
        sources[target] = source
    for target, source in sources.items():
        for folder in target.parents:
            if folder in sources:
                raise DerainError(
                    f"{folder}: output of {sources[folder]}, and output folder of {source}; rename one of the inputs"
                )
