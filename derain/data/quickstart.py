"""The data set ``Quickstart``: freely licensed photos with synthetic rain, generated on first use."""

from pathlib import Path

from filelock import FileLock

from derain.data.layouts import Split
from derain.data.quickstart_photos import write_photos
from derain.data.rain import PRESETS, synthesize
from derain.folders import cache_folder

RAINS_PER_PHOTO = {"train": 6, "test": 3}
"""Number of rainy images for each training tile and for each test photo."""


def quickstart_set(parent: Path) -> Path:
    """Generate what is missing of the data set in the folder ``parent/Quickstart``, and return this folder.

    Training and test images are made from different photos; the rain is that of the preset ``medium``.

    Raises:
        DerainError: If scikit-image, which contains the photos, is not installed.
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


def resolve_quickstart(name: str, split: Split) -> str:
    """Generate the data set ``Quickstart`` and return ``folder:PATH`` of a split; return other names unchanged.

    Args:
        name: Name of a data set, in any case.
        split: Split; for ``predict``, the folder is that of ``test``.

    Raises:
        DerainError: If scikit-image is not installed.
    """
    if name.lower() != "quickstart":
        return name
    folder = quickstart_set(cache_folder())
    return f"folder:{folder / ('train' if split == 'train' else 'test')}"
