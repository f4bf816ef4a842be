"""``derain score`` against a float64 program with NumPy and SciPy: time of the process, and differences of the scores.

Both read the same 100 pairs and write JSON. Pairs are those of Rain100L if DERAIN_DATA contains it, else generated ones
of the same size. Each of two rounds runs both; the shorter time counts. Targets: at most 1/3 of the time; scores differ
by at most 1e-6.
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

ROUNDS = 2
LIMIT = 1 / 3


def luma(rgb):
    """Return MATLAB's luma, 16 to 235, of RGB values in [0, 255]."""
    red, green, blue = (rgb[..., channel].astype(np.float64) for channel in range(3))
    return (65.481 * red + 128.553 * green + 24.966 * blue) / 255 + 16


def psnr(x, y):
    return 10 * np.log10(255**2 / np.mean((x - y) ** 2))


def ssim(x, y):
    """Return SSIM as Wang's ssim.m, line by line: an 11×11 window, filter2(…, 'valid'), K = (0.01, 0.03), L = 255."""
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
    """Return PSNR and SSIM of each image, ordered by name."""
    pairs = zip(sorted(Path(derained).glob("*.png")), sorted(Path(clean).glob("*.png")), strict=True)
    scores = []
    for pair in pairs:
        x, y = (luma(np.asarray(Image.open(path).convert("RGB"))) for path in pair)
        scores.append((psnr(x, y), ssim(x, y)))
    return scores


def images(folder):
    """Return the folders of derained and clean images, and a description."""
    root = os.environ.get("DERAIN_DATA")
    if root and (Path(root) / "Rain100L" / "rainy").is_dir():
        return Path(root) / "Rain100L" / "rainy", Path(root) / "Rain100L", "Rain100L's 100 rainy images"
    print("score: no Rain100L in DERAIN_DATA; using generated images")
    rng = np.random.default_rng(0)
    for name in ("derained", "clean"):
        (folder / name).mkdir()
    for number in range(100):
        clean = rng.integers(0, 256, (11, 16, 3), dtype=np.uint8)
        clean = np.asarray(Image.fromarray(clean).resize((481, 321), Image.Resampling.BICUBIC))
        noisy = np.clip(clean + rng.normal(0, 10, clean.shape), 0, 255).astype(np.uint8)
        Image.fromarray(clean).save(folder / "clean" / f"{number:03d}.png")
        Image.fromarray(noisy).save(folder / "derained" / f"{number:03d}.png")
    return folder / "derained", folder / "clean", "100 generated pairs of 481x321"


def timed(command):
    """Return the seconds of a process, and the content of the JSON that it prints."""
    start = time.perf_counter()
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, json.loads(process.stdout)


def main():
    """Print times and differences; return 1 if a target is missed."""
    with tempfile.TemporaryDirectory() as temporary:
        derained, clean, description = images(Path(temporary))
        folders = [str(derained), str(clean)]
        our_command = [sys.executable, "-m", "derain", "score", *folders, "--format", "json", "--lpips", "none"]
        scipy_command = [sys.executable, __file__, *folders]
        rounds = [(timed(our_command), timed(scipy_command)) for _ in range(ROUNDS)]
    our_seconds = min(our_time for (our_time, _), _ in rounds)
    scipy_seconds = min(scipy_time for _, (scipy_time, _) in rounds)
    (_, our_output), (_, scipy_scores) = rounds[0]
    images_by_name = sorted(our_output[0]["images"], key=lambda image: image["name"])
    our_scores = [(image["psnr"], image["ssim"]) for image in images_by_name]
    differences = np.abs(np.array(our_scores) - np.array(scipy_scores)).max(axis=0)
    ratio = our_seconds / scipy_seconds
    print(f"score: {description}, matlab-y, {os.cpu_count()} cores")
    print(f"  derain {our_seconds:.2f} s, NumPy/SciPy {scipy_seconds:.2f} s: ratio {ratio:.3f} (at most {LIMIT:.3f})")
    print(f"  maximum differences: {differences[0]:.1e} dB, {differences[1]:.1e} SSIM (at most 1e-06)")
    return 0 if ratio <= LIMIT and differences.max() <= 1e-6 else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(reference(*sys.argv[1:])))
    else:
        sys.exit(main())
