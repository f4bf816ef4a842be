"""Runs of the command in processes of their own: started, killed, looked at."""

import csv
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from derain.cli import main


def start(*arguments, program=("-m", "derain"), **variables):
    """A derain command in a process of its own, with environment variables of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*arguments, program=("-m", "derain")):
    """Waits for a derain command, or another program, in a process of its own; what it told."""
    return finish_all([start(*arguments, program=program)])[0]


def finish_all(processes):
    """Waits for processes that need each other; what each of them told."""
    try:
        with ThreadPoolExecutor(len(processes)) as pool:  # each is read from, lest it wait for its reader
            told = [text for text, _ in pool.map(lambda process: process.communicate(timeout=600), processes)]
    finally:
        for process in processes:
            process.terminate()
    for process, text in zip(processes, told, strict=True):
        assert process.returncode == 0, text
    return told


def kill_when_there_is(file, *arguments):
    """Kills a derain command by SIGKILL soon after a file has appeared."""
    process = start(*arguments)
    while not file.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    time.sleep(0.1)  # what is written meanwhile may be cut off
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def whole_and_resumed(fit, *columns):
    """Trains in one go, and with a kill after the first checkpoint; what both log in the columns must be equal.

    Returns:
        Last checkpoints: of the run in one go, of the killed run, and of the killed run resumed.
    """
    whole, killed = (["--trainer.default_root_dir", root] for root in ("whole", "killed"))
    assert main([*fit, *whole]) == 0
    run = Path("killed/fit-1")
    kill_when_there_is(run / "checkpoints/last.ckpt", *fit, *killed)
    broken_off = last(run)
    assert not (run / "weights.safetensors").exists()
    assert main([*fit, *killed, "--ckpt_path", "last"]) == 0
    assert metrics(Path("whole/fit-1"), *columns) == metrics(run, *columns)
    return last(Path("whole/fit-1")), broken_off, last(run)


def last(run):
    """The last checkpoint of a run."""
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def rows(path):
    """Rows of a table."""
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def metrics(run, *columns):
    """Rows of a run's metrics in which one of the columns is filled."""
    told = [{name: row.get(name) for name in ("epoch", "step", *columns)} for row in rows(run / "metrics.csv")]
    return [row for row in told if any(row[name] for name in columns)]


def differing(one, other):
    """Names of tensors that differ between two mappings, looked for as deep as they go."""
    found = []
    for name, value in one.items():
        if isinstance(value, dict):
            found += [f"{name}.{inner}" for inner in differing(value, other[name])]
        elif isinstance(value, torch.Tensor) and not torch.equal(value, other[name]):
            found.append(str(name))
    return found
