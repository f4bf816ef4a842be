"""The freely licensed photos of the quickstart, which scikit-image ships."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from derain.errors import DerainError
from derain.images import read_rgb, write_image


@dataclass(frozen=True)
class FreePhoto:
    """A photo that anyone may use.

    Attributes:
        file: Its file in ``skimage/data``.
        shows: What is to be seen.
        author: Who made it.
        licence: As scikit-image states it.
        split: What the quickstart uses it for; no photo serves both.
    """

    file: str
    shows: str
    author: str
    licence: str
    split: Literal["train", "test"]


PHOTOS = (
    FreePhoto("astronaut.png", "the astronaut Eileen Collins", "NASA", "public domain", "train"),
    FreePhoto("coffee.png", "a cup of coffee", "Rachel Michetti", "CC0", "train"),
    FreePhoto("camera.png", "a man with a camera, grey", "Lav Varshney", "CC0", "train"),
    FreePhoto("brick.png", "a brick wall, grey", "CC0Textures.com", "CC0", "train"),
    FreePhoto("grass.png", "grass, grey", "linolafett at deviantart.com", "CC0", "train"),
    FreePhoto("chelsea.png", "Chelsea the cat", "Stefan van der Walt", "CC0", "test"),
    FreePhoto("rocket.jpg", "a Falcon 9 before its launch", "SpaceX", "public domain", "test"),
)
"""Authors and licences are those that the docstrings of ``skimage.data`` give."""


def write_photos(folder: Path) -> list[Path]:
    """Writes the photos as PNG files to ``folder/train`` and ``folder/test``, and ``folder/LICENCES.txt``.

    A training photo is cut into four tiles, so that few photos give many kinds of rain; a test photo stays
    whole. No photo is in both folders.

    Args:
        folder: Where to; files of these names are replaced.

    Returns:
        The image files.

    Raises:
        DerainError: If scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")  # finds the folder without importing scikit-image
    if spec is None or spec.origin is None:
        raise DerainError(
            "the photos come with scikit-image, which is not installed; run: pip install 'derain[quickstart]'"
        )
    written, lines = [], []
    for photo in PHOTOS:
        pixels = read_rgb(Path(spec.origin).parent / "data" / photo.file)
        stem = Path(photo.file).stem
        parts = {stem: pixels}
        if photo.split == "train":
            halves = np.array_split(pixels, 2, axis=0)
            quarters = [quarter for half in halves for quarter in np.array_split(half, 2, axis=1)]
            parts = {f"{stem}-{number}": quarter for number, quarter in enumerate(quarters, 1)}
        for name, part in parts.items():
            written.append(folder / photo.split / f"{name}.png")
            write_image(written[-1], np.ascontiguousarray(part))
        lines.append(f"{photo.split}/{stem}: {photo.shows}; by {photo.author}; {photo.licence}\n")
    (folder / "LICENCES.txt").write_text("".join(lines), encoding="utf-8")
    return written
