"""``derain score`` against a plain float64 NumPy/SciPy program: time of the whole command, and agreement.

Both are processes of their own that read the same 100 pairs and write JSON: Rain100L where DERAIN_DATA names
a folder that holds it, else generated images of the same size. Turns alternate on one machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.signal import convolve2d

TURNS = 2
LIMIT = 1 / 3


def luma(rgb):
    red, green, blue = (rgb[..., channel].astype(np.float64) for channel in range(3))
    return (65.481 * red + 128.553 * green + 24.966 * blue) / 255 + 16


def psnr(x, y):
    return 10 * np.log10(255**2 / np.mean((x - y) ** 2))


def ssim(x, y):
    """Wang's ssim.m, line by line: an 11×11 window, filter2(…, 'valid'), K = (0.01, 0.03), L = 255."""
    grid = np.arange(-5, 6, dtype=np.float64)
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_x, mu_y = convolve2d(x, window, mode="valid"), convolve2d(y, window, mode="valid")
    sigma_x = convolve2d(x * x, window, mode="valid") - mu_x**2
    sigma_y = convolve2d(y * y, window, mode="valid") - mu_y**2
    sigma_xy = convolve2d(x * y, window, mode="valid") - mu_x * mu_y
    numerator = (2 * mu_x * mu_y + c1) * (2 * sigma_xy + c2)
    return np.mean(numerator / ((mu_x**2 + mu_y**2 + c1) * (sigma_x + sigma_y + c2)))


def reference(derained, clean):
    """Scores of the images, in order of their names."""
    pairs = zip(sorted(Path(derained).glob("*.png")), sorted(Path(clean).glob("*.png")), strict=True)
    scores = []
    for pair in pairs:
        x, y = (luma(np.asarray(Image.open(path).convert("RGB"))) for path in pair)
        scores.append((psnr(x, y), ssim(x, y)))
    return scores


def images(folder):
    """Folders of derained and clean images, and what they are."""
    root = os.environ.get("DERAIN_DATA")
    if root and (Path(root) / "Rain100L" / "rainy").is_dir():
        return Path(root) / "Rain100L" / "rainy", Path(root) / "Rain100L", "Rain100L's 100 rainy images"
    print("score: DERAIN_DATA names no folder with Rain100L; generated images instead")
    rng = np.random.default_rng(0)
    for side in ("derained", "clean"):
        (folder / side).mkdir()
    for number in range(100):
        clean = rng.integers(0, 256, (11, 16, 3), dtype=np.uint8)
        clean = np.asarray(Image.fromarray(clean).resize((481, 321), Image.Resampling.BICUBIC))
        noisy = np.clip(clean + rng.normal(0, 10, clean.shape), 0, 255).astype(np.uint8)
        Image.fromarray(clean).save(folder / "clean" / f"{number:03d}.png")
        Image.fromarray(noisy).save(folder / "derained" / f"{number:03d}.png")
    return folder / "derained", folder / "clean", "100 generated pairs of 481x321"


def timed(command):
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, json.loads(done.stdout)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        derained, clean, told = images(Path(temporary))
        folders = [str(derained), str(clean)]
        ours = [sys.executable, "-m", "derain", "score", *folders, "--format", "json", "--lpips", "none"]
        theirs = [sys.executable, __file__, *folders]
        turns = [(timed(ours), timed(theirs)) for _ in range(TURNS)]
    seconds = [min(turn[place][0] for turn in turns) for place in (0, 1)]
    scores = sorted(turns[0][0][1][0]["images"], key=lambda image: image["name"])
    apart = np.abs(np.array([(image["psnr"], image["ssim"]) for image in scores]) - np.array(turns[0][1][1])).max(
        axis=0
    )
    ratio = seconds[0] / seconds[1]
    print(f"score: {told}, matlab-y, {os.cpu_count()} cores")
    print(f"  derain score {seconds[0]:.2f} s, NumPy/SciPy {seconds[1]:.2f} s: ratio {ratio:.3f} (at most {LIMIT:.3f})")
    print(f"  furthest apart: {apart[0]:.1e} dB, {apart[1]:.1e} SSIM (at most 1e-06)")
    return 0 if ratio <= LIMIT and apart.max() <= 1e-6 else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(reference(*sys.argv[1:])))
    else:
        sys.exit(main())
