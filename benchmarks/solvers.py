"""Error of the second-order solvers on a Gaussian, and quality of all solvers on a trained network.

On a Gaussian: 2-Wasserstein distance between the solver's result and the clean residuals, with the exact score; this
needs neither weights nor data. On a network: PSNR, SSIM and time with 5 to 100 steps and three seeds, on a GPU if there
is one. Images are central crops of 128×128 from Rain800's test images; the protocol is `matlab-y`.

Target on the network: at least one ``mrs-*`` solver with 10 steps is at most 0.1 dB worse than posterior sampling with
100 steps on the same images and seeds, and at least 9 times as fast.

    DERAIN_DATA=data DERAIN_SDE_WEIGHTS=runs/rain800/fit-1/weights.safetensors python benchmarks/solvers.py
"""

import itertools
import math
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
from derain.methods.daclipsde.sde import MeanRevertingSDE
from derain.methods.daclipsde.solvers import SOLVERS, Sampling, visited_times
from derain.metrics import psnr_ssim, resolve
from derain.progress import track

STEPS, SEEDS, CROPS, SIDE = (5, 10, 20, 50, 100), (0, 1, 2), 8, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = 0.3, 0.15
"""Mean and standard deviation of the Gaussian of clean residuals; pixel values are in [0, 1]."""


class UnitNoise:
    """Noise whose n-th draw, from 1, is 1 in the image of index n, else 0: isolates the weight of each draw."""

    def __init__(self, images: int) -> None:
        self.images, self.draws = images, 0

    def __call__(self) -> torch.Tensor:
        """Return the next draw, ``(images, 1, 1, 1)``; image 0 never gets noise."""
        self.draws += 1
        noise = torch.zeros(self.images, 1, 1, 1)
        noise[self.draws] = 1
        return noise


def gaussian_error(solver: str, steps: int, max_sigma: float) -> float:
    """Return the 2-Wasserstein distance of a solver's residuals to N(MEAN, STD²), with the exact score.

    Every step is affine in state and noise, so the result is Gaussian. The first image of the batch gets no noise: its
    result is the mean. Every other image gets one draw of noise: its result minus the mean is the weight of that draw.
    """
    sde = MeanRevertingSDE(max_sigma)
    rainy = torch.zeros(steps + 2, 1, 1, 1)
    noise = UnitNoise(len(rainy))
    advance = SOLVERS[solver](sde, rainy, noise)  # type: ignore[arg-type]
    state = sde.scale * noise()
    for t, s in itertools.pairwise(visited_times(sde, steps)):
        decay, std = float(sde.decay[t]), float(sde.marginal_std[t])
        expected_noise = std * (state - decay * MEAN) / (decay**2 * STD**2 + std**2)
        state = advance(state, expected_noise, t, s)
    results = state.flatten().double()
    mean, weights = float(results[0]), results[1:] - results[0]
    return math.hypot(mean - MEAN, float(weights.norm()) - STD)


def print_gaussian_errors() -> None:
    """Print a table of the errors on a Gaussian."""
    names = ("mrs-ode2", "mars-ode2", "mrs-sde2", "mars-sde2")
    print("2-Wasserstein distance to a Gaussian of clean residuals")
    print(f"{'steps':>5} {'λ':>7}", *(f"{name:>10}" for name in names))
    for steps, max_sigma in itertools.product((5, 10), (10, 50)):
        errors = (gaussian_error(name, steps, max_sigma) for name in names)
        print(f"{steps:5} {f'{max_sigma}/255':>7}", *(f"{error:10.4f}" for error in errors))


def crops(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rainy and clean central crops ``(CROPS, 3, SIDE, SIDE)`` of evenly spaced test images, in [0, 1]."""
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
    """Return the mean PSNR in dB and the mean SSIM."""
    (protocol,) = resolve(["matlab-y"])
    pairs = zip(derained.permute(0, 2, 3, 1).numpy(), clean.permute(0, 2, 3, 1).numpy(), strict=True)
    scores = [psnr_ssim(image, reference, protocol) for image, reference in pairs]
    psnr, ssim = (statistics.mean(column) for column in zip(*scores, strict=True))
    return psnr, ssim


def main() -> int:
    """Print the tables; return 1 if a target is missed."""
    print_gaussian_errors()
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
