"""PReNet on images of Rain100L: ours against the authors' code (eager, float32, one image after another).

All variants take turns to restore the same images on all cores; ratios are medians over the images. Targets: float32
is at least as fast, and differs by at most 1e-5; on processors with bfloat16 instructions, bf16 has a speed-up of 1.6,
or 2.1 if compiled, and loses at most 0.02 dB. Other processors emulate bfloat16; its time is shown without a target.
The first four images are read from DERAIN_DATA, and the authors' weights from ``../weights/prenet``, relative to that
folder. Missing images are replaced by generated ones, and missing weights by random ones.
"""

import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from derain.images import read_rgb
from derain.memory import keep_freed_memory
from derain.methods import PReNetModule, catalog
from derain.metrics.full_reference import psnr_ssim
from derain.metrics.protocols import resolve
from derain.restoration import Restorer

IMAGES = 4
BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
VARIANTS = {
    "float32": {},
    "float32, compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
MIN_SPEED_UPS = {"float32": 1.0, "bf16": 1.6, "bf16, compiled": 2.1}


def authors(state, rainy):
    """Restore an image ``(h, w, 3)`` in [0, 1] by the authors' code, with their state dict."""

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    image = torch.from_numpy(rainy.transpose(2, 0, 1).copy())[None]
    h = c = torch.zeros(1, 32, *image.shape[2:])
    x = image
    for _ in range(6):
        x = torch.cat((F.relu(conv("conv0.0", torch.cat((image, x), 1))), h), 1)
        i, f, o = (torch.sigmoid(conv(f"conv_{gate}.0", x)) for gate in "ifo")
        c = f * c + i * torch.tanh(conv("conv_g.0", x))
        h = o * torch.tanh(c)
        x = h
        for block in range(1, 6):
            x = F.relu(F.relu(conv(f"res_conv{block}.2", F.relu(conv(f"res_conv{block}.0", x)))) + x)
        x = conv("conv.0", x) + image
    return x[0].permute(1, 2, 0).clamp(0, 1).numpy()


def images():
    """Return rainy images in [0, 1], clean ones in [0, 255], and a description."""
    root = Path(os.environ.get("DERAIN_DATA", "")) / "Rain100L"
    if (root / "rainy").is_dir():
        names = [f"{number:03d}.png" for number in range(1, IMAGES + 1)]
        rainy = [read_rgb(root / "rainy" / f"rain-{name}") for name in names]
        clean = [read_rgb(root / f"norain-{name}") for name in names]
        description = f"the first {IMAGES} images of Rain100L"
    else:
        rng = np.random.default_rng(0)
        coarse = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(IMAGES)]
        clean = [cv2.resize(image, (481, 321), interpolation=cv2.INTER_CUBIC) for image in coarse]
        rainy = [np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8) for image in clean]
        description = f"{IMAGES} generated images of 481×321"
    return [image.astype(np.float32) / 255 for image in rainy], clean, description


def method():
    """Return the PReNet module, and a description of its weights."""
    path = Path(os.environ.get("DERAIN_DATA", ""), "../weights/prenet/Rain100L/PReNet6/net_latest.pth")
    if path.is_file():
        return catalog.load(path).module, "the authors' weights"
    torch.manual_seed(0)
    return PReNetModule(), "random weights"


def emulated(network, rainy):
    """Restore an image ``(h, w, 3)`` in [0, 1] in bf16; used on processors without bf16 instructions."""
    image = torch.from_numpy(rainy.transpose(2, 0, 1).copy())[None]
    with torch.autocast("cpu", torch.bfloat16):
        derained = network(image.contiguous(memory_format=torch.channels_last))
    return derained[0].permute(1, 2, 0).clamp(0, 1).numpy()


def timed(restore, *inputs):
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    with torch.inference_mode():
        derained = restore(*inputs)
    return time.perf_counter() - start, derained


def main():
    """Print the table; return 1 if a target is missed."""
    keep_freed_memory()  # as derain restore does; all variants benefit
    rainy, clean, description = images()
    module, weights_description = method()
    state = {name: value.clone() for name, value in module.network.state_dict().items()}
    variants = {"authors": partial(timed, authors, state)}
    for name, options in VARIANTS.items():
        if BF16 or "bf16" not in name:
            variants[name] = partial(timed, Restorer(method()[0], device="cpu", tile=None, **options))
    if not BF16:
        variants["bf16, emulated"] = partial(timed, emulated, module.network)
    for restore in variants.values():  # the first call compiles, and fills caches
        restore(rainy[0])
    rounds = [{name: restore(image) for name, restore in variants.items()} for image in rainy]

    cpu = torch.cpu.get_capabilities()
    title = f"PReNet on {description}, {weights_description}; {cpu.get('cpu_name', 'CPU')}, {os.cpu_count()} cores"
    table = Table(title=title)
    for column in ("variant", "s per image", "speed-up", "target", "dB", "max. difference"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    missed = [name for name in variants if not add_row(table, name, rounds, clean)]
    Console(width=110).print(table)
    if not BF16:
        print("no bfloat16 instructions: no target for bf16")
    print(f"missed: {', '.join(missed)}" if missed else "all targets are met")
    return 1 if missed else 0


def add_row(table, name, rounds, clean):
    """Add a row for a variant; return whether the variant meets its targets."""
    times, speed_ups, differences, gains = [], [], [], []
    protocol = resolve(["matlab-y"])[0]
    for results, image in zip(rounds, clean, strict=True):
        seconds, derained = results[name]
        reference_seconds, reference = results["authors"]
        times.append(seconds)
        speed_ups.append(reference_seconds / seconds)
        differences.append(np.abs(derained - reference).max())
        gains.append(psnr_ssim(derained, image, protocol)[0] - psnr_ssim(reference, image, protocol)[0])
    speed_up, difference, gain = statistics.median(speed_ups), max(differences), np.mean(gains)
    target = MIN_SPEED_UPS.get(name)
    columns = (f"{statistics.median(times):.2f}", f"{speed_up:.2f}", f"{target:.1f}" if target else "")
    table.add_row(name, *columns, f"{gain:+.4f}", f"{difference:.1e}")
    if name not in VARIANTS:
        return True
    fast = target is None or speed_up >= target
    exact = "float32" not in name or difference <= 1e-5
    return fast and exact and gain >= -0.02


if __name__ == "__main__":
    sys.exit(main())
