"""Training batches (8 crops of 128×128, flips) from the pixel cache against decoding two files a sample.

At least 20 times the samples per second is asked for, of one process and of each way's default number of workers, and
resident memory that does not grow with workers. The same with two workers each is shown: there, sending a batch
between processes takes longer than making it.
Real images of Rain100L are used where DERAIN_DATA has them, else generated ones of the same size.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import psutil
from torch.utils.data import DataLoader

from derain.data.cache import CacheMode, open_cache
from derain.data.datamodule import TrainingPairs
from derain.data.pairs import Pair, find_pairs
from derain.data.samplers import Stage, TrainingBatchSampler
from derain.data.transforms import Augmentation
from derain.images import write_image

SAMPLES: dict[CacheMode, int] = {"disk": 8000, "off": 400}
"""So many that each way is timed for seconds, not for the start of its workers."""

LEAST = 20
READ = 400


def a_set(folder: Path) -> str:
    """Rain100L, or 60 generated pairs of 481×321."""
    root = os.environ.get("DERAIN_DATA")
    if root and (Path(root) / "Rain100L").is_dir():
        return f"Rain100L:{root}/Rain100L"
    rng = np.random.default_rng(0)
    for place in range(60):
        clean = cv2.resize(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), (481, 321), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(clean + rng.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
        write_image(folder / "target" / f"{place}.png", clean)
        write_image(folder / "input" / f"{place}.png", noisy)
    return f"folder:{folder}"


def samples_per_second(pairs: tuple[Pair, ...], mode: CacheMode, workers: int) -> float:
    """Samples a second from the second batch on."""
    dataset = TrainingPairs(pairs, open_cache(pairs, mode), {128: Augmentation(128)}, seed=0)
    order = TrainingBatchSampler(SAMPLES[mode], rank=0, world=1, seed=0, stages=[Stage(0, 128, 8)])
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers))
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["name"]) for batch in batches)
    return count / (time.perf_counter() - start)


def worker_memory(pairs: tuple[Pair, ...], workers: int) -> float:
    """Memory in MiB that a worker does not share, in the middle of an epoch that reads every image."""
    dataset = TrainingPairs(pairs, open_cache(pairs, "disk"), {128: Augmentation(128)}, seed=0)
    order = TrainingBatchSampler(4 * READ, rank=0, world=1, seed=0, stages=[Stage(0, 128, 8)])
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers))
    for _ in range(READ // 8):
        next(batches)
    children = psutil.Process().children()
    return sum(child.memory_full_info().uss for child in children) / 2**20 / len(children)


def main() -> int:
    """Prints speeds, their ratios, and memory a worker; 1 if the defaults or memory miss their limit."""
    warnings.filterwarnings("ignore", ".*suggested max number of worker.*")
    os.environ["DERAIN_CACHE"] = tempfile.mkdtemp()
    found = find_pairs(a_set(Path(tempfile.mkdtemp())), "test")
    print(f"at least 20 times asked for; batches of 8 crops of 128×128 from {len(found.pairs)} pairs of {found.layout}")
    speed = {(mode, n): samples_per_second(found.pairs, mode, n) for mode in SAMPLES for n in (0, 2)}
    ratios = []
    for fast, slow in ((0, 0), (0, 2), (2, 2)):  # without workers is the default with a cache, with them without
        ratios.append(speed["disk", fast] / speed["off", slow])
        print(
            f"  cache with {fast} workers {speed['disk', fast]:,.0f}/s, decoding with {slow} workers "
            f"{speed['off', slow]:,.0f}/s: {ratios[-1]:.1f} times"
        )
    memory = [worker_memory(found.pairs, workers) for workers in (1, 4)]
    print(f"  memory of its own that a worker takes: {memory[0]:.0f} MiB with 1, {memory[1]:.0f} MiB with 4 workers")
    return int(min(ratios[:2]) < LEAST or memory[1] > 1.5 * memory[0])


if __name__ == "__main__":
    sys.exit(main())
