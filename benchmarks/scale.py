"""Rain removal from large photos at reduced size: ``--scale`` with the factors 1 (full size), 2, 3, 4, 6 and ``auto``.

``scale.py [--sides 512 1024 2048 4096] [--crop 768] [--rain heavy] [--weights W] [--sheet sheet.png]`` enlarges photos
of scikit-image, adds noise as fine detail, and adds rain whose streaks grow with the photo (`derain.data.rain`). The
model restores only a crop in the middle, to save time. For each shorter side of the photos and each factor, the
benchmark prints the PSNR of the rainy and of the restored crop; the PSNR with the true rain instead of the model's
estimate, which is the limit at this factor; and the seconds of processor time per megapixel. The contact sheet shows
the crops of the first photo.

Target: for each size, ``auto`` is within 0.5 dB of the best factor.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from skimage import data

from derain.data.rain import PRESETS, add_rain, sample_rain
from derain.images import Pixels, to_bytes, write_image
from derain.pictures import contact_sheet
from derain.restoration import Restorer
from derain.scaling import automatic_factor, reduce, subtract_rain

FACTORS = (1, 2, 3, 4, 6)
PHOTOS = ("astronaut", "coffee", "chelsea")


def enlarged(photo: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Return a photo resized to the length ``side`` of its shorter side, with noise of σ = 2 as fine detail."""
    scale = side / min(photo.shape[:2])
    large = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    noisy = large + 2 * rng.standard_normal(large.shape, np.float32)
    return np.asarray(np.clip(np.rint(noisy), 0, 255), np.uint8)


def middle(image: Pixels, side: int) -> Pixels:
    """Return the middle of an image, at most ``side`` pixels wide and high."""
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def psnr(image: Pixels, clean: Pixels) -> float:
    """Return the PSNR of RGB values, in dB."""
    with np.errstate(divide="ignore"):  # equal images
        return float(-10 * np.log10(np.mean((image.astype(np.float64) - clean) ** 2) / 255**2))


def removed_exactly(rainy: Pixels, clean: Pixels, factor: int) -> Pixels:
    """Return the rainy image minus its true rain, which is reduced and enlarged again: the limit of any model."""
    full, target = (torch.from_numpy(image / np.float32(255)).movedim(-1, 0) for image in (rainy, clean))
    restored = subtract_rain(full, reduce(full, factor), reduce(target, factor))
    return to_bytes(restored.movedim(0, -1).numpy())


class Result(NamedTuple):
    """Result of one factor: PSNR of the model, PSNR with the true rain, and seconds of processor time per megapixel."""

    model: float
    limit: float
    seconds: float


def measure(
    restorer: Restorer, side: int, crop: int, rain: str, seed: int
) -> tuple[float, dict[int, Result], dict[str, Pixels]]:
    """Return the PSNR of the rainy photos and the results by factor, both as means, and crops of the first photo."""
    factors = sorted({*FACTORS, automatic_factor(side, side)})
    rainy_scores, results = [], {factor: [] for factor in factors}
    pictures: dict[str, Pixels] = {}
    for number, name in enumerate(PHOTOS):
        rng = np.random.default_rng([seed, number])
        clean = enlarged(getattr(data, name)(), side, rng)
        rainy = middle(add_rain(clean, sample_rain(*PRESETS[rain], rng), rng), crop)
        clean = middle(clean, crop)
        rainy_scores.append(psnr(rainy, clean))
        if number == 0:
            pictures |= {"clean": clean, "rainy": rainy}
        for factor in factors:
            restorer.scale = factor
            start = time.process_time()
            restored = restorer(rainy)
            seconds = (time.process_time() - start) / rainy[..., 0].size * 1e6
            limit = psnr(removed_exactly(rainy, clean, factor), clean)
            results[factor].append(Result(psnr(restored, clean), limit, seconds))
            if number == 0 and factor in FACTORS:
                pictures[f"scale {factor}"] = restored
    means = {factor: Result(*np.mean(values, axis=0).tolist()) for factor, values in results.items()}
    return float(np.mean(rainy_scores)), means, pictures


def main() -> int:
    """Print results by size and factor; return 1 if auto is more than 0.5 dB below the best factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="shorter sides of photos")
    parser.add_argument("--crop", type=int, default=768, help="side of the restored crop in pixels")
    parser.add_argument("--rain", choices=list(PRESETS), default="heavy")
    parser.add_argument("--weights", default="default", help="bundled model or weights file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="image to write: a row of crops for each side")
    options = parser.parse_args()
    restorer = Restorer(options.weights, device="cpu")
    rows, worst = [], 0.0
    print(f"{options.rain} rain; factor: PSNR in dB (limit: with the true rain), seconds per megapixel; * auto")
    for side in options.sides:
        rainy_psnr, results, pictures = measure(restorer, side, options.crop, options.rain, options.seed)
        auto = automatic_factor(side, side)
        worst = max(worst, max(result.model for result in results.values()) - results[auto].model)
        for factor, result in results.items():
            mark = "*" if factor == auto else " "
            print(f"{side:5d}  rainy {rainy_psnr:.2f}  {factor}{mark}: {result.model:.2f} ", end="")
            print(f"(limit {result.limit:.2f}), {result.seconds:.2f} s", flush=True)
        rows.append(list(pictures.values()))
    print(f"auto is at most {worst:.2f} dB below the best factor")
    if options.sheet:
        labels = [str(side) for side in options.sides]
        write_image(options.sheet, contact_sheet(rows, column_labels=list(pictures), row_labels=labels))
    return int(worst > 0.5)


if __name__ == "__main__":
    sys.exit(main())
