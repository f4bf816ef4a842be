"""Many images by the model ``default``: ``Restorer`` on 64 images at once against one by one; a folder of 50 photos.

``restoring.py [--images 64] [--photos 50] [--rounds 3]``. Images are noise of 256×256 pixels; photos are generated,
768×512, half of them JPEG and half PNG. Targets: all images at once are restored 1.2 times as fast as one by one on
a CPU, and 6 times on a GPU; ``derain restore`` spends at least 90 % of the time after its first call of the network in
the network. Other programs on the same cores distort the results.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from _timing import report, time_alternately

from derain.cli import main as derain
from derain.images import write_image
from derain.methods import DerainModule
from derain.restoration import Restorer

MIN_SPEED_UP = {"cpu": 1.2, "cuda": 6.0}
MIN_SHARE = 0.9


def several_images(count: int, rounds: int) -> bool:
    """Time ``Restorer`` on all images at once and on one after the other; return whether the target is met."""
    restorer = Restorer("default")
    images = torch.rand(count, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(restorer.device)
    variants = {
        "one by one": lambda: [restorer(image).cpu() for image in images],
        "all": lambda: restorer(images).cpu(),
    }
    times = time_alternately(variants, rounds)
    difference = float((restorer(images) - torch.stack([restorer(image) for image in images])).abs().max())
    ratio = report(f"{count} images of 256×256", times, {"one by one": 0.0, "all": difference})
    return ratio >= MIN_SPEED_UP.get(restorer.device.type, 1.0)


class NetworkTime:
    """Records when methods compute, on all threads."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []
        self._started: dict[int, float] = {}

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Record the calls of all methods, until the returned handles are removed."""
        before = torch.nn.modules.module.register_module_forward_pre_hook(self._before)
        return [before, torch.nn.modules.module.register_module_forward_hook(self._after)]

    def _before(self, module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, DerainModule):
            self._started[threading.get_ident()] = time.perf_counter()

    def _after(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, DerainModule):
            self.calls.append((self._started[threading.get_ident()], time.perf_counter()))

    @property
    def seconds(self) -> float:
        """Time in which at least one call was in progress."""
        total, end = 0.0, 0.0
        for first, last in sorted(self.calls):
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        return total


def folder_of_photos(count: int) -> bool:
    """Measure the share of time of the network in ``derain restore``; return whether the target is met."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name, "photos")
        photos.mkdir()
        coarse = rng.integers(256, size=(count, 8, 12, 3), dtype=np.uint8)
        for index, grid in enumerate(coarse):
            photo = np.kron(grid, np.ones((64, 64, 1), np.uint8)) // 2 + rng.integers(
                64, size=(512, 768, 3), dtype=np.uint8
            )
            write_image(photos / f"{index}.{'jpg' if index % 2 else 'png'}", photo)
        network = NetworkTime()
        handles = network.attach()
        derain(["restore", str(photos), str(Path(name, "derained"))])
        for handle in handles:
            handle.remove()
        end = time.perf_counter()
    share = network.seconds / (end - min(first for first, _ in network.calls))
    print(f"{count} photos of 768×512: since its first call, {share:.1%} of the time in the network")
    return share >= MIN_SHARE


def main() -> int:
    """Print the measurements; return 1 if a target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64, help="number of images of 256×256")
    parser.add_argument("--photos", type=int, default=50, help="number of photos of 768×512")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after a warm-up")
    options = parser.parse_args()
    are_met = [several_images(options.images, options.rounds), folder_of_photos(options.photos)]
    return int(not all(are_met))


if __name__ == "__main__":
    sys.exit(main())
