"""Networks of other systems against the plain form of their papers, and the memory of a 1920×1080 photo.

``zoo.py [NETWORK …] [--size 256] [--rounds 3]`` restores an image with random weights, by derain's blocks and by the
plain ones of ``_plain.py``; both keep large blocks of freed memory. Target: outputs equal to 1e-4 of the largest value,
and a network no slower than its plain form (5 % are noise). Networks that use no block with another form are listed.

``zoo.py --memory [NETWORK …]`` restores one tile of the side that derain chooses for the photo with 4 GiB of memory,
each network in a process of its own, while it holds the image and the sum of the tiles. Target: at most 4 GiB.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from _plain import plain
from _timing import time_alternately
from torch import Tensor

from derain import restoration
from derain.memory import keep_freed_memory
from derain.methods import RegressionModule
from derain.networks import NETWORKS
from derain.restoration import Restorer

LIMIT = 4.0
"""Memory in GiB."""

HEIGHT, WIDTH = 1080, 1920
TOLERANCE, MIN_SPEED_UP = 1e-4, 0.95


def module(name: str) -> RegressionModule:
    """Return a network with random weights; those that start as zeros, too."""
    torch.manual_seed(0)
    method = RegressionModule(network=name).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return method


@torch.inference_mode()
def compare(name: str, size: int, rounds: int) -> bool:
    """Print the time of a network and its plain form; return whether a target is missed."""
    network = module(name).network
    contiguous = torch.rand(1, 3, size, size)
    image = contiguous.contiguous(memory_format=torch.channels_last)  # as derain restores it
    with plain() as used:
        expected = network(contiguous)
    if not used:
        print(f"{name:12} is the plain form", flush=True)
        return False
    differences = (network(image) - expected).abs() / expected.abs().max()

    def run_plain() -> Tensor:
        with plain():
            return network(contiguous)

    variants: dict[str, Callable[[], object]] = {"plain": run_plain, "derain": lambda: network(image)}
    times = time_alternately(variants, rounds)
    wall, processor = (times["plain"][index] / times["derain"][index] for index in range(2))
    missed = float(differences.max()) > TOLERANCE or max(wall, processor) < MIN_SPEED_UP
    print(
        f"{name:12} {wall:.2f} times as fast, {processor:.2f} by processor time "
        f"(plain {times['plain'][0]:.2f} s, derain {times['derain'][0]:.2f} s); "
        f"{float(differences.max()):.0e} apart{' MISSED' if missed else ''}",
        flush=True,
    )
    return missed


def measure_memory(name: str) -> None:
    """Print the side of the tiles of a photo, and the peak memory of this process in GiB."""
    keep_freed_memory()
    method = module(name)
    restorer = Restorer(method, device="cpu")
    with patch.object(restoration, "memory_for", lambda device: int(LIMIT * 2**30)):
        tile = restorer._first_tile(HEIGHT, WIDTH)
    window = getattr(method.network, "window", None)  # of NeRD-Rain, which bounds its memory itself
    image = torch.rand(1, 3, HEIGHT, WIDTH)
    held = torch.ones_like(image), torch.ones(1, 1, HEIGHT, WIDTH)
    crop = image[0, :, : min(tile, HEIGHT), : min(tile, WIDTH)]
    if isinstance(window, int) and window < tile and method.bytes_per_pixel < 1000:
        crop = image[0, :, :window, : window + 1]  # two windows
    Restorer(method, device="cpu", tile=None)(crop)
    print(tile, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(held))


def memory(name: str) -> bool:
    """Measure a network in a process of its own; return whether it needs too much memory."""
    command = [sys.executable, __file__, "--measure", name]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tile, peak = output.split()[:2]
    missed = float(peak) > LIMIT
    print(f"{name:12} tiles of {tile}: {float(peak):.2f} GiB{' MISSED' if missed else ''}", flush=True)
    return missed


def main() -> int:
    """Print a line for each network; return 1 if a target is missed."""
    names = [path.rpartition(".")[2] for path in NETWORKS]
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=names)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_memory(arguments.measure)
        return 0
    if arguments.memory:
        print(f"{WIDTH}×{HEIGHT} on the CPU, at most {LIMIT:.0f} GiB")
        return int(sum(memory(name) for name in arguments.networks) > 0)
    keep_freed_memory()
    print(f"{arguments.size}×{arguments.size}, {torch.get_num_threads()} threads")
    return int(sum(compare(name, arguments.size, arguments.rounds) for name in arguments.networks) > 0)


if __name__ == "__main__":
    sys.exit(main())
