"""Quality of all solvers with 5 to 100 steps and three seeds, on a trained network.

Targets: a semi-analytic solver (``mrs-*``) with 10 steps is at most 0.1 dB worse than posterior sampling with 100 steps
on the same images and seeds, and at least 9 times as fast. Images are central crops of 128×128 of test images; PSNR and
SSIM by the protocol `matlab-y`; on a GPU if there is one.

    DERAIN_DATA=data DERAIN_SDE_WEIGHTS=runs/rain800/fit-1/weights.safetensors python benchmarks/solvers.py
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from derain.data.pairs import find_pairs
from derain.memory import keep_freed_memory
from derain.methods import DACLIPSDEModule, catalog
from derain.methods.daclipsde.solvers import SOLVERS, Sampling
from derain.metrics import psnr_ssim, resolve
from derain.progress import track

STEPS, SEEDS, CROPS, SIDE = (5, 10, 20, 50, 100), (0, 1, 2), 8, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def crops(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rainy and clean central crops of evenly spaced test images, in [0, 1]."""
    pairs = find_pairs(name, "test", data_root=Path(os.environ["DERAIN_DATA"])).pairs
    rainy_crops: list[torch.Tensor] = []
    clean_crops: list[torch.Tensor] = []
    for index in np.linspace(0, len(pairs) - 1, CROPS).round().astype(int):
        rainy, clean = pairs[index].read()
        rainy_crops.append(central_crop(rainy))
        clean_crops.append(central_crop(clean))
    return torch.stack(rainy_crops), torch.stack(clean_crops)


def central_crop(pixels: np.ndarray) -> torch.Tensor:
    top, left = ((length - SIDE) // 2 for length in pixels.shape[:2])
    crop = np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1))
    return torch.from_numpy(crop).float() / 255


def evaluate(derained: torch.Tensor, clean: torch.Tensor) -> tuple[float, float]:
    """Return the mean PSNR and SSIM."""
    (protocol,) = resolve(["matlab-y"])
    pairs = zip(derained.permute(0, 2, 3, 1).numpy(), clean.permute(0, 2, 3, 1).numpy(), strict=True)
    scores = [psnr_ssim(image, reference, protocol) for image, reference in pairs]
    psnr, ssim = (statistics.mean(column) for column in zip(*scores, strict=True))
    return psnr, ssim


def main() -> int:
    """Print the table; return 1 if a target is missed."""
    file = os.environ.get("DERAIN_SDE_WEIGHTS")
    if not file or not os.environ.get("DERAIN_DATA"):
        print("skipped: needs DERAIN_SDE_WEIGHTS (weights of DACLIPSDEModule) and DERAIN_DATA (data sets)")
        return 0
    keep_freed_memory()
    module = catalog.load(Path(file)).module
    assert isinstance(module, DACLIPSDEModule)
    module = module.to(DEVICE)
    rainy, clean = crops("Rain800")
    rainy = rainy.to(DEVICE)
    conditions = module.encode(rainy)
    print("rainy: {:.3f} dB / {:.4f}".format(*evaluate(rainy.cpu(), clean)))
    print(f"{'solver':10} {'steps':>5} {'PSNR, dB':>16} {'SSIM':>16} {'seconds':>8}")
    results: dict[tuple[str, int], tuple[float, float]] = {}
    rows = [(solver, steps) for solver in SOLVERS for steps in STEPS]
    for solver, steps in track(rows, "Sampling", len(rows)):
        scores, times = [], []
        for seed in SEEDS:
            module.set_sampling(Sampling(solver, steps, seed))
            start = time.perf_counter()
            derained = module(rainy, **conditions).cpu()
            times.append(time.perf_counter() - start)
            scores.append(evaluate(derained.clamp(0, 1), clean))
        psnrs, ssims = zip(*scores, strict=True)
        seconds = statistics.median(times)
        results[solver, steps] = statistics.mean(psnrs), seconds
        psnr = f"{statistics.mean(psnrs):.3f} ± {statistics.stdev(psnrs):.3f}"
        ssim = f"{statistics.mean(ssims):.4f} ± {statistics.stdev(ssims):.4f}"
        print(f"{solver:10} {steps:5} {psnr:>16} {ssim:>16} {seconds:8.2f}", flush=True)
    reference_psnr, reference_seconds = results["posterior", 100]
    met = False
    for solver in ("posterior", "mrs-ode1", "mrs-ode2", "mrs-sde2"):
        psnr, seconds = results[solver, 10]
        gain, speed_up = psnr - reference_psnr, reference_seconds / seconds
        print(f"{solver} with 10 steps against posterior with 100: {gain:+.3f} dB, {speed_up:.1f} times as fast")
        met |= solver.startswith("mrs") and gain >= -0.1 and speed_up >= 9
    print("all targets are met" if met else "a target is missed")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
