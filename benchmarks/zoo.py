"""Published networks against plain forms of their blocks, and their memory for a 1920×1080 photo.

``zoo.py [NETWORK …] [--size 256] [--rounds 3]`` restores an image with random weights, with derain's blocks and with
the plain forms of ``_plain.py``; glibc keeps freed memory for both. Targets: outputs differ by at most 1e-4 of the
largest value (compared in float64 if float32 differs more), and the network is no slower than its plain form, with a
tolerance of 5 %. Networks without optimised blocks are skipped.

``zoo.py --memory [NETWORK …]`` measures the peak memory of each network in a process of its own. The process restores
one tile, of the size that derain chooses for the photo with 4 GiB of memory, while the photo and the sum of the tiles
are in memory. Target: at most 4 GiB. With ``--part 4``, a quarter of a tile is restored, and the memory that it needs
is multiplied by 4; NeRD-Rain always restores two of its windows.
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

from derain import batching
from derain.memory import keep_freed_memory
from derain.methods import RegressionModule
from derain.networks import NETWORKS
from derain.restoration import Restorer

LIMIT = 4.0
"""Memory in GiB."""

HEIGHT, WIDTH = 1080, 1920
TOLERANCE, MIN_SPEED_UP = 1e-4, 0.95


def module(name: str) -> RegressionModule:
    """Return a module with random weights, including those that are initialised with zeros."""
    torch.manual_seed(0)
    method = RegressionModule(network=name).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return method


@torch.inference_mode()
def compare(name: str, size: int, rounds: int) -> bool:
    """Print the times of a network and its plain form; return whether a target is missed."""
    network = module(name).network
    contiguous = torch.rand(1, 3, size, size)
    image = contiguous.contiguous(memory_format=torch.channels_last)  # as derain restores it
    with plain() as used:
        expected = network(contiguous)
    if not used:
        print(f"{name:12} has no optimised blocks", flush=True)
        return False
    difference = float((network(image) - expected).abs().max() / expected.abs().max())

    def run_plain(image: Tensor = contiguous) -> Tensor:
        with plain():
            return network(image)

    variants: dict[str, Callable[[], object]] = {"plain": run_plain, "derain": lambda: network(image)}
    times = time_alternately(variants, rounds)
    wall, processor = (times["plain"][index] / times["derain"][index] for index in range(2))
    if difference > TOLERANCE:  # random weights may magnify the rounding of float32
        network.double()
        small = contiguous[..., :64, :64].double()
        difference = float((network(small) - run_plain(small)).abs().max() / expected.abs().max())
    missed = difference > TOLERANCE or max(wall, processor) < MIN_SPEED_UP
    print(
        f"{name:12} {wall:.2f} times as fast, {processor:.2f} by processor time "
        f"(plain {times['plain'][0]:.2f} s, derain {times['derain'][0]:.2f} s); "
        f"{difference:.0e} apart{' MISSED' if missed else ''}",
        flush=True,
    )
    return missed


def measure_memory(name: str, part: int) -> None:
    """Print the side of a photo's tiles, and the peak memory of restoring one tile in GiB.

    Args:
        name: The network.
        part: Divisor of the number of pixels that are restored, and factor of the memory that they need; ignored for
            NeRD-Rain.
    """
    keep_freed_memory()
    method = module(name)
    with patch.object(batching, "memory_for", lambda device: int(LIMIT * 2**30)):
        tile = Restorer(method, device="cpu").scheduler._tile_side(HEIGHT, WIDTH)
    image = torch.rand(3, HEIGHT, WIDTH)
    tile_sums = torch.ones(4, HEIGHT, WIDTH)  # the sum of the tiles and of their weights
    rows, columns = (round(min(tile, side) / part**0.5) for side in (HEIGHT, WIDTH))
    if isinstance(window := getattr(method.network, "window", None), int) and name == "NeRDRain":
        rows, columns, part = window, window + 1, 1  # restores large images in windows: measure two of them
    restorer = Restorer(method, device="cpu", tile=None)
    restorer(image[:, :64, :64])  # libraries allocate memory that they keep
    before = peak_memory()
    restorer(image[:, :rows, :columns])
    print(tile, before + part * (peak_memory() - before))
    del tile_sums  # needed until here, to be counted


def peak_memory() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(name: str, part: int) -> bool:
    """Measure a network in a process of its own, print its memory, and return whether that is too much."""
    command = [sys.executable, __file__, "--measure", "--part", str(part), name]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tile, peak = output.split()
    missed = float(peak) > LIMIT
    print(f"{name:12} tiles of {tile}: {float(peak):.2f} GiB{' MISSED' if missed else ''}", flush=True)
    return missed


def main() -> int:
    """Print a line for each network; return 1 if a target is missed."""
    names = [path.rpartition(".")[2] for path in NETWORKS]
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=names, help="names of networks; by default all")
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after a warm-up")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--part", type=int, default=1, help="with --memory: restore 1/PART of a tile")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_memory(arguments.networks[0], arguments.part)
        return 0
    if arguments.memory:
        print(f"{WIDTH}×{HEIGHT} on the CPU, at most {LIMIT:.0f} GiB")
        return int(sum(memory(name, arguments.part) for name in arguments.networks) > 0)
    keep_freed_memory()
    print(f"{arguments.size}×{arguments.size}, {torch.get_num_threads()} threads")
    return int(sum(compare(name, arguments.size, arguments.rounds) for name in arguments.networks) > 0)


if __name__ == "__main__":
    sys.exit(main())
