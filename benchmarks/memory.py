"""Peak resident memory of ``derain restore`` for a 3840×2160 photo with a full-size PReNet; target: at most 4 GiB."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from derain.images import write_image
from derain.methods import PReNetModule

LIMIT = 4.0
"""Memory in GiB."""


def main() -> int:
    """Print memory and time; return 1 if the target is missed."""
    folder = Path(tempfile.mkdtemp())
    coarse = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    write_image(folder / "photo.png", cv2.resize(coarse, (3840, 2160), interpolation=cv2.INTER_CUBIC))
    PReNetModule().save_weights(folder / "w.safetensors")
    command = ["-m", "derain", "restore", folder / "photo.png", folder / "out.png"]
    command += ["--weights", folder / "w.safetensors", "--device", "cpu"]
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"3840×2160 on the CPU: {peak:.2f} GiB (at most {LIMIT:.0f} GiB), {seconds:.0f} s")
    return int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
