"""Training samples (crops of 128×128, flips, no pixel cache) from shards on a local disk against image files.

Targets: at least 0.98 times the samples per second, the same batches of 8, and at most 1.05 times the peak memory and
the time to the first batch. Images are generated: 100 pairs of 480×320 as PNG, and 100 as JPEG. Times are processor
times of one process without workers; the fastest of several rounds counts, so that other load hardly matters.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from derain.data.datamodule import RainDataModule
from derain.data.pairs import find_pairs
from derain.data.samplers import Sample
from derain.data.shard_writer import write_shards
from derain.images import write_image

PAIRS = 100
ROUNDS = 8
MIN_SPEED = 0.98
MAX_COST = 1.05


def write_sets(folder: Path, suffix: str) -> tuple[str, str]:
    """Write pairs as files and as shards; return the options that name the two data sets."""
    rng = np.random.default_rng(0)
    for index in range(PAIRS):
        coarse = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        clean = cv2.resize(coarse, (480, 320), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(clean + rng.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
        write_image(folder / "files" / "target" / f"{index}{suffix}", clean)
        write_image(folder / "files" / "input" / f"{index}{suffix}", noisy)
    files = f"folder:{folder / 'files'}"
    write_shards(find_pairs(files, "train"), folder / "shards", 10_000_000)
    return files, str(folder / "shards")


def data_module(train: str) -> RainDataModule:
    """Return a data module that has found its pairs."""
    module = RainDataModule(train=train, val="none", crop=128, batch_size=8, cache="off", workers=0)
    module.setup("fit")
    return module


def sample_seconds(modules: Sequence[RainDataModule]) -> list[float]:
    """Return, for each module, the processor seconds for all samples of an epoch.

    Each sample is read by the modules in turn, and its fastest reading counts.
    """
    datasets = [module.train_dataloader().dataset for module in modules]
    fastest = np.full((PAIRS, len(modules)), np.inf)
    for _ in range(ROUNDS):
        for number in range(PAIRS):
            for column, dataset in enumerate(datasets):
                start = time.process_time()
                dataset[Sample(0, number, 128)]
                fastest[number, column] = min(fastest[number, column], time.process_time() - start)
    return list(fastest.sum(axis=0))


def compare(options: tuple[str, str]) -> bool:
    """Print samples per second, time to the first batch and peak memory; return whether the targets are met.

    Args:
        options: Options that name the data sets of files and of shards.
    """
    modules = [data_module(option) for option in options]
    for file_batch, shard_batch in zip(*(module.train_dataloader() for module in modules), strict=True):
        assert file_batch["name"] == shard_batch["name"]
        assert torch.equal(file_batch["rainy"], shard_batch["rainy"])
        assert torch.equal(file_batch["clean"], shard_batch["clean"])
    seconds = np.array(sample_seconds(modules))
    fresh = np.min([[first_batch(option) for option in options] for _ in range(2)], axis=0)
    speeds, (first, memory) = PAIRS / seconds, fresh.T
    speed, delay, size = speeds[1] / speeds[0], first[1] / first[0], memory[1] / memory[0]
    print(f"  samples per second: files {speeds[0]:.0f}, shards {speeds[1]:.0f}: {speed:.2f} times")
    print(f"  first batch: files {first[0] * 1e3:.0f} ms, shards {first[1] * 1e3:.0f} ms: {delay:.2f} times")
    print(f"  peak memory: files {memory[0]:.0f} MiB, shards {memory[1]:.0f} MiB: {size:.3f} times")
    return speed >= MIN_SPEED and max(delay, size) <= MAX_COST


def first_batch(option: str) -> tuple[float, float]:
    """Return the processor time to the first batch in seconds and the peak memory in MiB, of a new process."""
    command = [sys.executable, "-m", "benchmarks.shards", "--first-batch", option]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, memory = map(float, output.split())
    return seconds, memory


def main() -> int:
    """Compare files and shards, for PNG and JPEG; return 1 if a target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--first-batch", metavar="SET", help="print seconds to the first batch, and peak memory in MiB")
    arguments = parser.parse_args()
    if arguments.first_batch:
        start = time.process_time()
        next(iter(data_module(arguments.first_batch).train_dataloader()))
        seconds = time.process_time() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return 0
    passed = []
    for suffix in (".png", ".jpg"):
        with tempfile.TemporaryDirectory() as folder:
            options = write_sets(Path(folder), suffix)
            print(f"batches of 8 crops of 128×128 from {PAIRS} pairs of 480×320, {suffix}")
            passed.append(compare(options))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
