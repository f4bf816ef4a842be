"""The set ``Quickstart``: rain on a few freely licensed photos, made where it is asked for."""

from pathlib import Path

from filelock import FileLock

from derain.data.quickstart_photos import write_photos
from derain.data.rain import PRESETS, synthesize

PER_PHOTO = {"train": 6, "test": 3}
"""Rains on one training tile, and on one held-out photo."""


def quickstart_set(folder: Path) -> Path:
    """Makes the set below ``folder`` unless it is there, and gives its folder.

    Training and test photos are different ones; the rain is of preset ``medium``.

    Args:
        folder: Where the set's folder ``Quickstart`` shall stand.
    """
    place = folder / "Quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "Quickstart.lock"):
        if not (place / "photos" / "LICENCES.txt").is_file():
            write_photos(place / "photos")
        for split, count in PER_PHOTO.items():
            if not (place / split / "rain.json").is_file():
                photos = place / "photos" / split
                synthesize(photos, place / split, PRESETS["medium"], per_image=count, seed=0)
    return place
