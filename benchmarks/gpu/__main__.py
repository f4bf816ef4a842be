"""Tests and benchmarks on a GPU: ``make gpu``, or ``python -m benchmarks.gpu [ITEM …]``.

Every item of ``items.ITEMS`` runs in a process of its own and writes a JSON file to ``runs/gpu/DEVICE``. Items with a
file from the same hardware and versions are skipped, so that an interrupted run continues. The page
``benchmarks/gpu.md`` is written from the files. With ``--quick``, sizes are tiny, and the page is written beside the
files instead. The exit code is 1 if an item is unfinished or a test failed, and 2 if CUDA is needed but not available.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not start CUDA before the processes fork

import torch

import derain
from benchmarks.gpu.items import ITEMS, ROOT, Context, Item, run_item
from benchmarks.gpu.report import page
from derain.callbacks.results import cpu_name, device_name

TOTAL = 510.0
"""Limit of the seconds for all items; Python's start and the page need a few more."""


def describe(device: torch.device) -> dict[str, Any]:
    """Return the names and versions of hardware and software."""
    return {
        "device": device_name(device),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "derain": derain.__version__,
    }


def load_results(folder: Path, environment: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the content of the files of finished items by name; those of other hardware or versions are ignored."""
    results = {}
    for item in ITEMS:
        path = folder / f"{item.name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if content.get("environment") == environment:
            results[item.name] = content
    return results


def stored_peaks(folder: Path, environment: Mapping[str, Any]) -> dict[str, float]:
    """Return the device's peaks in bytes or operations per second; empty if the item ``device`` is not finished."""
    rows = load_results(folder, environment).get("device", {}).get("rows", ())
    units = {"GB/s": 1e9, "TFLOP/s": 1e12}
    return {row["measurement"]: row["value"] * units[row["unit"]] for row in rows}


def work(item: Item, context: Context, environment: Mapping[str, Any], folder: Path) -> None:
    """Run an item in this process, which becomes the leader of a process group; write its output to ``ITEM.log``."""
    os.setpgrp()
    with (folder / f"{item.name}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    run_item(item, context, environment, folder / f"{item.name}.json")


def run(item: Item, context: Context, environment: Mapping[str, Any], folder: Path, limit: float) -> str:
    """Run an item in a process, and end it after a limit in seconds.

    Returns:
        What went wrong; empty if nothing did.
    """
    process = multiprocessing.get_context("fork").Process(target=work, args=(item, context, environment, folder))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"ended after {limit:.0f} s"
    return f"failed (exit code {process.exitcode}, see {folder / item.name}.log)" if process.exitcode else ""


def in_process(function: Any, *arguments: Any) -> Any:
    """Return the result of a function that may start CUDA, from a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def choose_device(name: str) -> torch.device | None:
    """Return the device; None if it is a GPU and CUDA is not available."""
    device = torch.device(name)
    return None if device.type == "cuda" and not torch.cuda.is_available() else device


def measure_all(items: list[Item], context: Context, environment: Mapping[str, Any], folder: Path, total: float) -> int:
    """Run the items that are not finished; return the number of those that remain unfinished."""
    start, unfinished = time.perf_counter(), 0
    finished = load_results(folder, environment)
    for item in items:
        if item.name in finished:
            print(f"{item.name}: finished before", flush=True)
            continue
        begin = time.perf_counter()
        remaining = start + total - begin
        limit = remaining if context.quick else min(item.budget, remaining)  # a busy CPU may exceed the budget
        if limit < 5:
            print(f"{item.name}: no time left", flush=True)
            unfinished += 1
            continue
        context.deadline = begin + 0.7 * limit  # no measurement begins in the last 30 %
        problem = run(item, context, environment, folder, limit)
        unfinished += bool(problem)
        print(f"{item.name}: {problem or 'done'} ({time.perf_counter() - begin:.0f} s)", flush=True)
        if item.name == "device":
            context.peaks = stored_peaks(folder, environment)
    return unfinished


def main() -> int:
    """Run the items, write the page and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [item.name for item in ITEMS]
    parser.add_argument("items", nargs="*", default=names, metavar="ITEM", help=f"by default all: {', '.join(names)}")
    parser.add_argument("--device", default="cuda", help="device, such as cuda:1; cpu needs --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the items; benchmarks/gpu.md is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the results")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds after which items are ended")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.items) - set(names))
    if unknown:
        parser.error(f"{unknown[0]}: unknown item; expected one of {', '.join(names)}")
    device = choose_device(arguments.device)
    if device is None or (device.type != "cuda" and not arguments.quick):
        print(f"make gpu: {arguments.device} is no GPU of this machine; to test the items: --device cpu --quick")
        return 2
    environment = in_process(describe, device) | ({"sizes": "tiny"} if arguments.quick else {})
    folder = arguments.out / re.sub(r"\W+", "-", environment["device"] + (" quick" if arguments.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    items = [item for item in ITEMS if item.name in {"device", *arguments.items}]  # rooflines need the peaks
    context = Context(device, arguments.quick, 0.0, stored_peaks(folder, environment))
    unfinished = measure_all(items, context, environment, folder, arguments.total)
    results = load_results(folder, environment)
    target = folder / "gpu.md" if arguments.quick else ROOT / "benchmarks/gpu.md"
    target.write_text(page(results), encoding="utf-8")
    failed = results["tests"]["rows"][0]["failed"] if "tests" in results else 0
    tests = f"{failed} failed tests" if "tests" in results else "tests not run"
    print(f"{target}: {len(results)} of {len(ITEMS)} items; {unfinished} unfinished; {tests}")
    if unfinished:
        print("run the command again for the rest")
    return int(unfinished > 0 or failed > 0)


if __name__ == "__main__":
    sys.exit(main())
