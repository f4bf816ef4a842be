"""The bundled models against the one of derain 0.1, a small Restormer: seconds per megapixel for a 640×480 image.

``bundled.py [--rounds 5]`` restores one image on one thread, in alternation. Targets: ``default`` is at least 6 times,
and ``fast`` 20 times as fast. Weights do not change the time, so those of derain 0.1 are random here.
"""

import argparse
import sys

import torch
from _timing import time_alternately

from derain.methods import RestormerModule
from derain.models import bundled
from derain.restoration import Restorer

HEIGHT, WIDTH = 480, 640
MIN_SPEED_UP = {"default": 6.0, "fast": 20.0}


def main() -> int:
    """Print the times; return whether the target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after a warm-up")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    old = RestormerModule(dim=24, blocks=(1, 1, 1, 1), refinement=1)
    restorers = {"derain 0.1": Restorer(old, device="cpu")}
    restorers |= {name: Restorer(name, device="cpu") for name in bundled()}
    image = torch.rand(1, 3, HEIGHT, WIDTH)
    times = time_alternately({name: lambda r=r: r(image) for name, r in restorers.items()}, rounds)
    megapixels = HEIGHT * WIDTH / 1e6
    before = times["derain 0.1"][1]
    for name, (_, processor) in times.items():
        print(f"{name:12} {processor / megapixels:6.2f} s per megapixel, {before / processor:.1f} times as fast")
    return int(any(before / times[name][1] < least for name, least in MIN_SPEED_UP.items()))


if __name__ == "__main__":
    sys.exit(main())
