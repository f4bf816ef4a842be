"""The data set ``Quickstart``: rain on a few freely licensed photos, generated on first use."""

from pathlib import Path

from filelock import FileLock

from derain.data.quickstart_photos import write_photos
from derain.data.rain import PRESETS, synthesize

RAINS_PER_PHOTO = {"train": 6, "test": 3}
"""Number of rainy images for each training tile and for each test photo."""


def quickstart_set(parent: Path) -> Path:
    """Generate the data set in ``parent/Quickstart`` if it is missing, and return this folder.

    Training and test photos differ; the rain is of preset ``medium``.
    """
    folder = parent / "Quickstart"
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / "Quickstart.lock"):
        if not (folder / "photos" / "LICENCES.txt").is_file():
            write_photos(folder / "photos")
        for split, count in RAINS_PER_PHOTO.items():
            if not (folder / split / "rain.json").is_file():
                synthesize(folder / "photos" / split, folder / split, PRESETS["medium"], per_image=count, seed=0)
    return folder
