"""Quality for network evaluations: every solver, 5 to 100 steps, three seeds, on a network that was trained.

Asked for: a semi-analytic solver (``mrs-*``) at 10 steps at most 0.1 dB below posterior sampling at 100, and at least 9
times as fast; the differences are of the same images and seeds. Crops of 128×128 from the middle of test images, PSNR
and SSIM under `matlab-y`, on a GPU where there is one.

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
    """Rainy and clean crops from the middle of evenly chosen test images, in [0, 1]."""
    pairs = find_pairs(name, "test", data_root=Path(os.environ["DERAIN_DATA"])).pairs
    sides: list[list[torch.Tensor]] = [[], []]
    for index in np.linspace(0, len(pairs) - 1, CROPS).round().astype(int):
        for side, pixels in zip(sides, pairs[index].read(), strict=True):
            top, left = ((n - SIDE) // 2 for n in pixels.shape[:2])
            part = np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1))
            side.append(torch.from_numpy(part).float() / 255)
    rainy, clean = (torch.stack(side) for side in sides)
    return rainy, clean


def judge(derained: torch.Tensor, clean: torch.Tensor) -> tuple[float, float]:
    """Mean PSNR and SSIM."""
    (protocol,) = resolve(["matlab-y"])
    pairs = zip(derained.permute(0, 2, 3, 1).numpy(), clean.permute(0, 2, 3, 1).numpy(), strict=True)
    found = [psnr_ssim(one, other, protocol) for one, other in pairs]
    psnr, ssim = (statistics.mean(column) for column in zip(*found, strict=True))
    return psnr, ssim


def main() -> int:
    """Prints the table; 1 if an aim is missed."""
    file = os.environ.get("DERAIN_SDE_WEIGHTS")
    if not file or not os.environ.get("DERAIN_DATA"):
        print("left out: DERAIN_SDE_WEIGHTS names no weights of DACLIPSDEModule, or DERAIN_DATA no data")
        return 0
    keep_freed_memory()
    module = catalog.load(Path(file)).module
    assert isinstance(module, DACLIPSDEModule)
    module = module.to(DEVICE)
    rainy, clean = crops("Rain800")
    rainy = rainy.to(DEVICE)
    perceived = module.encode(rainy)
    print("rainy: {:.3f} dB / {:.4f}".format(*judge(rainy.cpu(), clean)))
    print(f"{'solver':10} {'steps':>5} {'PSNR, dB':>16} {'SSIM':>16} {'seconds':>8}")
    found: dict[tuple[str, int], tuple[float, float]] = {}
    rows = [(solver, steps) for solver in SOLVERS for steps in STEPS]
    for solver, steps in track(rows, "Sampling", len(rows)):
        scores, times = [], []
        for seed in SEEDS:
            module.sample_by(Sampling(solver, steps, seed))
            start = time.perf_counter()
            derained = module(rainy, **perceived).cpu()
            times.append(time.perf_counter() - start)
            scores.append(judge(derained.clamp(0, 1), clean))
        psnr, ssim = ([score[place] for score in scores] for place in (0, 1))
        found[solver, steps] = statistics.mean(psnr), statistics.median(times)
        told = [f"{statistics.mean(one):.3f} ± {statistics.stdev(one):.3f}" for one in (psnr,)]
        told += [f"{statistics.mean(ssim):.4f} ± {statistics.stdev(ssim):.4f}"]
        print(f"{solver:10} {steps:5} {told[0]:>16} {told[1]:>16} {found[solver, steps][1]:8.2f}", flush=True)
    slow = found["posterior", 100]
    met = False
    for solver in ("posterior", "mrs-ode1", "mrs-ode2", "mrs-sde2"):
        psnr, seconds = found[solver, 10]
        ratio = slow[1] / seconds
        print(f"{solver} at 10 against posterior at 100: {psnr - slow[0]:+.3f} dB, {ratio:.1f} times as fast")
        met |= solver.startswith("mrs") and psnr >= slow[0] - 0.1 and ratio >= 9
    print("all asked for is met" if met else "an aim is missed")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
