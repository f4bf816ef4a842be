"""``derain --help`` against ``python -c "import lightning"``, in turn; at most 1/8 is asked for."""

import statistics
import subprocess
import sys
import time


def seconds(*command: str) -> float:
    """Wall time of a process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


LIMIT = 1 / 8


def main() -> int:
    """Prints medians and the ratio; 1 if the limit is broken."""
    rounds = [(seconds("-m", "derain", "--help"), seconds("-c", "import lightning")) for _ in range(5)][1:]
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"derain --help {ours:.3f} s, import lightning {theirs:.3f} s: ratio {ours / theirs:.3f} (at most {LIMIT})")
    return int(ours / theirs > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
