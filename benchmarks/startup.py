"""Start-up time of ``derain --help`` against ``import lightning``; target: at most 1/8."""

import statistics
import subprocess
import sys
import time

LIMIT = 1 / 8


def seconds(*command: str) -> float:
    """Return the wall-clock time of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    """Print medians and the ratio; return 1 if the target is missed."""
    rounds = [(seconds("-m", "derain", "--help"), seconds("-c", "import lightning")) for _ in range(5)][1:]
    derain, lightning = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = derain / lightning
    print(f"derain --help {derain:.3f} s, import lightning {lightning:.3f} s: ratio {ratio:.3f} (at most {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
