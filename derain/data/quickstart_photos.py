"""Freely licensed photos in scikit-image, for the quickstart."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from derain.errors import DerainError
from derain.images import read_rgb, write_image


@dataclass(frozen=True)
class FreePhoto:
    """Freely licensed photo.

    Attributes:
        file: File in ``skimage/data``.
        subject: Subject of the photo.
        author: Author.
        licence: Licence or status, as stated by scikit-image.
        split: Split of the data set ``Quickstart``.
    """

    file: str
    subject: str
    author: str
    licence: str
    split: Literal["train", "test"]


PHOTOS = (
    FreePhoto("astronaut.png", "the astronaut Eileen Collins", "NASA", "public domain", "train"),
    FreePhoto("coffee.png", "a cup of coffee", "Rachel Michetti", "CC0", "train"),
    FreePhoto("camera.png", "a man with a camera (greyscale)", "Lav Varshney", "CC0", "train"),
    FreePhoto("brick.png", "a brick wall (greyscale)", "CC0Textures.com", "CC0", "train"),
    FreePhoto("grass.png", "grass (greyscale)", "linolafett at deviantart.com", "CC0", "train"),
    FreePhoto("chelsea.png", "Chelsea the cat", "Stefan van der Walt", "CC0", "test"),
    FreePhoto("rocket.jpg", "a Falcon 9 before its launch", "SpaceX", "public domain", "test"),
)
"""Photos with authors and licences as in the docstrings of ``skimage.data``."""


def write_photos(folder: Path) -> list[Path]:
    """Write the photos as PNG files to ``folder/train`` and ``folder/test``, and ``folder/LICENCES.txt``.

    Training photos are cut into four tiles, so that training sees more kinds of rain; test photos are not cut. No photo
    is in both folders.

    Args:
        folder: Output folder; existing files of the same names are replaced.

    Returns:
        Paths of the images.

    Raises:
        DerainError: If scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")  # finds the folder without importing scikit-image
    if spec is None or spec.origin is None:
        raise DerainError(
            "scikit-image is not installed; the quickstart uses its photos; run: pip install 'derain[quickstart]'"
        )
    written, lines = [], []
    for photo in PHOTOS:
        pixels = read_rgb(Path(spec.origin).parent / "data" / photo.file)
        stem = Path(photo.file).stem
        images = {stem: pixels}
        if photo.split == "train":
            upper, lower = np.array_split(pixels, 2, axis=0)
            tiles = [*np.array_split(upper, 2, axis=1), *np.array_split(lower, 2, axis=1)]
            images = {f"{stem}-{number}": tile for number, tile in enumerate(tiles, 1)}
        for name, image in images.items():
            path = folder / photo.split / f"{name}.png"
            write_image(path, np.ascontiguousarray(image))
            written.append(path)
        lines.append(f"{photo.split}/{stem}: {photo.subject}; by {photo.author}; {photo.licence}\n")
    (folder / "LICENCES.txt").write_text("".join(lines), encoding="utf-8")
    return written
