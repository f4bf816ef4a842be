"""Draw the degradations that ``--data.rain`` adds to a photo: a row for each kind, with the photo and then each draw.

``python benchmarks/degradations.py sheet.png`` shows all kinds, ``--rows light varied drops`` only the named ones. A
name may also be ``folder:PATH`` or a YAML file of ranges. If the folder ``DERAIN_DATA`` is set, further rows show
crops of rainy images of Rain100L, Rain100H, Rain800 and RealPhotos, as far as they are in the folder.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import skimage
import torch

from derain.data.pairs import find_pairs
from derain.data.quickstart_photos import PHOTOS
from derain.data.rain_operators import RainDegradation
from derain.data.rain_ranges import RAIN_ALONE, RAIN_RANGES, RainRanges, read_rain
from derain.errors import DerainError
from derain.images import Pixels, read_rgb, write_image
from derain.pictures import contact_sheet

ALONE = dataclasses.replace(RainRanges(), **RAIN_ALONE)
CLEAR = dataclasses.replace(ALONE, clear_share=1)
KINDS = {
    **RAIN_RANGES,
    "added": dataclasses.replace(ALONE, added_share=1),
    "screened": dataclasses.replace(ALONE, screened_share=1),
    "sky light": ALONE,
    "hard": dataclasses.replace(ALONE, hard_share=1),
    "veil": dataclasses.replace(ALONE, veil_share=1, veil=(0.2, 0.3), density=(0.5, 1.2)),
    "mist": dataclasses.replace(CLEAR, mist_share=1),
    "drops": dataclasses.replace(CLEAR, drops_share=1),
    "exposure": dataclasses.replace(CLEAR, gamma_share=1),
    "light colour": dataclasses.replace(CLEAR, gain_share=1),
    "defocus": dataclasses.replace(CLEAR, defocus_share=1),
    "noise": dataclasses.replace(CLEAR, noise_share=1),
    "resampling": dataclasses.replace(CLEAR, resampling_share=1),
    "JPEG": dataclasses.replace(CLEAR, jpeg_share=1),
}
"""Ranges by row: the presets, then each degradation alone, in the ranges of ``varied`` (but a dense ``veil``)."""

SETS = {"Rain100L": "test", "Rain100H": "test", "Rain800": "test", "RealPhotos": "predict"}
"""Splits by the names of data sets in ``DERAIN_DATA``."""


def middle(pixels: Pixels, side: int) -> Pixels:
    """Return the middle of an image, at most ``side`` pixels wide and high."""
    top, left = (max(0, (size - side) // 2) for size in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def free_photo(stem: str) -> Pixels:
    """Return a photo of scikit-image."""
    (photo,) = (photo for photo in PHOTOS if Path(photo.file).stem == stem)
    return read_rgb(Path(skimage.__file__).parent / "data" / photo.file)


def draws(ranges: RainRanges, photo: Pixels, count: int) -> list[Pixels]:
    """Return the photo with different draws of the degradations."""
    clean = torch.from_numpy(photo).permute(2, 0, 1).float().div(255).repeat(count, 1, 1, 1)
    rainy, _ = RainDegradation(ranges)(clean, seed=0)
    return list(rainy.mul(255).round().byte().permute(0, 2, 3, 1).numpy())


def real_rows(root: Path, count: int, side: int) -> dict[str, list[Pixels]]:
    """Return crops of evenly spaced rainy images by data set; print the data sets that are missing."""
    rows = {}
    for name, split in SETS.items():
        try:
            pairs = find_pairs(root / name, split).pairs
        except DerainError as error:
            print(f"{name}: skipped ({error})")
            continue
        chosen = pairs[:: max(1, len(pairs) // count)][:count]
        rows[name] = [middle(pair.read()[0], side) for pair in chosen]
    return rows


def main() -> int:
    """Write the picture and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("degradations.png"), help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", default=list(KINDS), help="kinds, folder:PATH, or YAML files")
    parser.add_argument("--photo", type=Path, help="clean photo; by default the cat of scikit-image")
    parser.add_argument("--draws", type=int, default=6, help="number of draws in a row")
    parser.add_argument("--side", type=int, default=176, help="side of the crops in pixels")
    options = parser.parse_args()
    try:
        photo = middle(read_rgb(options.photo) if options.photo else free_photo("chelsea"), options.side)
        ranges = {name: KINDS[name] if name in KINDS else read_rain(name) for name in options.rows}
        rows = {name: [photo, *draws(kind, photo, options.draws)] for name, kind in ranges.items()}
        if "DERAIN_DATA" in os.environ:
            rows |= real_rows(Path(os.environ["DERAIN_DATA"]), options.draws + 1, options.side)
        write_image(options.out, contact_sheet(list(rows.values()), row_labels=list(rows), cell=options.side))
    except DerainError as error:
        print(error, file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
