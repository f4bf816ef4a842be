"""Rain that no bundled model was trained on: PSNR before and after, and optionally a picture.

``unseen_rain.py [--weights default fast] [--picture FILE]`` adds the rain of albumentations and kornia, which are not
derain's generators, to the test photos of `derain data photos`, restores them, and prints the mean PSNR in dB in RGB.
The picture shows the results of the first weights.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import albumentations as A
import kornia.augmentation as K
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from derain.data.quickstart_photos import write_photos
from derain.images import read_rgb, write_image
from derain.pictures import contact_sheet
from derain.restoration import Restorer

Pixels = NDArray[np.uint8]
SEED = 3


def albumentations_rain(clean: Pixels, kind: str) -> Pixels:
    """Return the photo with the streaks of albumentations' rain, without its blur and its darkening."""
    slant = (-18, -12)
    rain = A.RandomRain(slant_range=slant, drop_width=1, blur_value=1, brightness_coefficient=1.0, rain_type=kind, p=1)
    return A.Compose([rain], seed=SEED)(image=clean)["image"]


def kornia_rain(clean: Pixels) -> Pixels:
    """Return the photo with rain of kornia."""
    torch.manual_seed(SEED)
    rain = K.RandomRain(number_of_drops=(1500, 1500), drop_height=(12, 20), drop_width=(-5, -3), p=1.0)
    image = torch.tensor(clean).permute(2, 0, 1)[None].float() / 255
    return rain(image)[0].permute(1, 2, 0).mul(255).round().byte().numpy()


GENERATORS: dict[str, Callable[[Pixels], Pixels]] = {
    "albumentations drizzle": lambda clean: albumentations_rain(clean, "drizzle"),
    "albumentations heavy": lambda clean: albumentations_rain(clean, "heavy"),
    "albumentations torrential": lambda clean: albumentations_rain(clean, "torrential"),
    "kornia": kornia_rain,
}


def mean_psnr(images: Sequence[Pixels], clean: Sequence[Pixels]) -> float:
    """Return the mean PSNR in dB in RGB."""
    squares = [np.square(i.astype(np.float64) - c).mean() for i, c in zip(images, clean, strict=True)]
    return float(np.mean(10 * np.log10(255**2 / np.array(squares))))


def main() -> None:
    """Print the table, and write the picture if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["default", "fast"], help="bundled models or weights files")
    parser.add_argument("--picture", type=Path, help="image to write: a row for each generator")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        photos = [read_rgb(file) for file in write_photos(Path(folder)) if file.parent.name == "test"]
    restorers = {name: Restorer(name, device="cpu") for name in options.weights}

    table = Table(title=f"mean PSNR in dB of {len(photos)} photos")
    for column in ("generator", "rainy", *restorers):
        table.add_column(column)
    rows = []
    for generator, add_rain in GENERATORS.items():
        rainy = [add_rain(photo) for photo in photos]
        derained = {name: restorer(rainy) for name, restorer in restorers.items()}
        means = (mean_psnr(images, photos) for images in (rainy, *derained.values()))
        table.add_row(generator, *(f"{mean:.2f}" for mean in means))
        first = next(iter(derained.values()))
        rows.append([image for pair in zip(rainy, first, strict=True) for image in pair])
    Console().print(table)
    if options.picture:
        sheet = contact_sheet(rows, column_labels=("rainy", "restored") * len(photos), cell=320)
        write_image(options.picture, np.asarray(sheet))


if __name__ == "__main__":
    main()
