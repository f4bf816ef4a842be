"""Training batches (8 crops of 128×128, flips) from the pixel cache against decoding both files of each sample.

Targets: at least 20 times the samples per second, without workers, and without workers for the cache against two for
decoding; unshared memory per worker with four workers at most 1.5 times that with one. The ratio with two workers each
has no target: sending a batch between processes then takes longer than loading it. Images are those of Rain100L if
DERAIN_DATA contains it, else generated ones of the same size.
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
from derain.data.datasets import TrainingPairs
from derain.data.pairs import Pair, find_pairs
from derain.data.samplers import BatchStage, TrainingBatchSampler
from derain.data.transforms import Augmentation
from derain.images import write_image

SAMPLES: dict[CacheMode, int] = {"disk": 8000, "off": 400}
"""Number of samples by cache mode: enough to load for seconds, so that prefetched batches hardly count."""

MIN_SPEED_UP = 20
MEMORY_SAMPLES = 400
"""Number of samples that are loaded before the memory is measured."""


def data_set(folder: Path) -> str:
    """Return the data set in the form ``LAYOUT:PATH``: Rain100L, or a folder with 60 generated pairs of 481×321."""
    root = os.environ.get("DERAIN_DATA")
    if root and (Path(root) / "Rain100L").is_dir():
        return f"Rain100L:{root}/Rain100L"
    rng = np.random.default_rng(0)
    for index in range(60):
        clean = cv2.resize(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), (481, 321), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(clean + rng.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
        write_image(folder / "target" / f"{index}.png", clean)
        write_image(folder / "input" / f"{index}.png", noisy)
    return f"folder:{folder}"


def samples_per_second(pairs: tuple[Pair, ...], mode: CacheMode, workers: int) -> float:
    """Return the samples per second after the first batch."""
    dataset = TrainingPairs(pairs, open_cache(pairs, mode), {128: Augmentation(128)}, seed=0)
    order = TrainingBatchSampler(SAMPLES[mode], rank=0, world=1, seed=0, stages=[BatchStage(0, 128, 8)])
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers))
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["name"]) for batch in batches)
    return count / (time.perf_counter() - start)


def worker_memory(pairs: tuple[Pair, ...], workers: int) -> float:
    """Return the mean unshared memory of a worker in MiB, after a quarter of an epoch."""
    dataset = TrainingPairs(pairs, open_cache(pairs, "disk"), {128: Augmentation(128)}, seed=0)
    order = TrainingBatchSampler(4 * MEMORY_SAMPLES, rank=0, world=1, seed=0, stages=[BatchStage(0, 128, 8)])
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers))
    for _ in range(MEMORY_SAMPLES // 8):
        next(batches)
    children = psutil.Process().children()
    return sum(child.memory_full_info().uss for child in children) / 2**20 / len(children)


def main() -> int:
    """Print speeds, ratios and memory per worker; return 1 if a target is missed."""
    warnings.filterwarnings("ignore", ".*suggested max number of worker.*")
    os.environ["DERAIN_CACHE"] = tempfile.mkdtemp()
    split = find_pairs(data_set(Path(tempfile.mkdtemp())), "test")
    print(
        f"batches of 8 crops of 128×128 from {len(split.pairs)} pairs of {split.layout} (at least {MIN_SPEED_UP} times)"
    )
    speeds = {(mode, n): samples_per_second(split.pairs, mode, n) for mode in SAMPLES for n in (0, 2)}
    ratios = []
    for cache_workers, decoding_workers in ((0, 0), (0, 2), (2, 2)):
        cached, decoded = speeds["disk", cache_workers], speeds["off", decoding_workers]
        ratios.append(cached / decoded)
        print(
            f"  cache with {cache_workers} workers {cached:,.0f}/s, decoding with {decoding_workers} workers "
            f"{decoded:,.0f}/s: {ratios[-1]:.1f} times"
        )
    memory = [worker_memory(split.pairs, workers) for workers in (1, 4)]
    print(f"  unshared memory per worker: {memory[0]:.0f} MiB with 1, {memory[1]:.0f} MiB with 4 workers")
    return int(min(ratios[:2]) < MIN_SPEED_UP or memory[1] > 1.5 * memory[0])


if __name__ == "__main__":
    sys.exit(main())
