"""Runs of the command: started in processes of their own, killed, and read."""

import csv
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from derain.cli import main
from tests.forks import ForkedCommand

EXPERIMENT = {
    "model": {"class_path": "PReNetModule", "init_args": {"variant": "PRN_r", "stages": 1}},
    "data": {
        "train": "Rain800",
        "test": "Rain800",
        "predict": "Rain800",
        "crop": 16,
        "batch_size": 4,
        "workers": 0,
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "limit_train_batches": 2},
}
"""Configuration of a training that takes a moment."""

TINY_GAN = {"channels": 4, "stages": [1, 1, 1, 1], "hierarchy": 1, "heads": 1}
TINY_GAN |= {"discriminator_channels": 4, "discriminator_stages": 1}
"""Hyper-parameters of a tiny PLNLINGANModule."""


def fit(*options, config="exp.yaml"):
    """Run ``derain fit`` and return its exit code."""
    return main(["fit", "--config", config, *options])


def with_callbacks(folder, *callbacks, config="exp"):
    """Write ``callbacks.yaml``: a configuration with callbacks, each a name and its arguments."""
    content = yaml.safe_load((folder / f"{config}.yaml").read_text())
    content["trainer"]["callbacks"] = [{"class_path": name, "init_args": arguments} for name, arguments in callbacks]
    (folder / "callbacks.yaml").write_text(yaml.safe_dump(content))
    return "callbacks.yaml"


def error_line(capsys):
    """Return the last line of standard error, the only one that reports an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("derain: error: ")]
    assert errors == lines[-1:]
    return errors[0]


def start(*arguments, program=("-m", "derain"), fresh=False, **variables):
    """Start a derain command in a process, with additional environment variables.

    Args:
        arguments: The arguments of the command.
        program: ``-m`` and a module, or a script.
        fresh: Start Python anew; otherwise the process is forked from one that has imported PyTorch and Lightning.
        variables: Environment variables.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
    if not fresh and sys.platform == "linux":
        return ForkedCommand(program, arguments, environment)
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*arguments, program=("-m", "derain")):
    """Run a derain command, or another program, in a process (see `start`); return its output."""
    return finish_all([start(*arguments, program=program)])[0]


def finish_all(processes):
    """Wait for processes that need each other; return the output of each."""
    try:
        with ThreadPoolExecutor(len(processes)) as pool:  # a process whose output is not read may block
            outputs = [output for output, _ in pool.map(lambda process: process.communicate(timeout=600), processes)]
    finally:
        for process in processes:
            process.terminate()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def wait_for(file, process):
    """Wait until a process has written a file."""
    while not file.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def wait_for_line(text, process):
    """Wait until a process has printed a line with a text; return the line."""
    while True:
        for line in process.stdout:
            if text in line and line.endswith("\n"):
                return line
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def kill_when_there_is(file, *arguments):
    """Kill a derain command by SIGKILL soon after it has written a file."""
    process = start(*arguments)
    wait_for(file, process)
    time.sleep(0.1)  # files that are being written may be truncated
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def whole_and_resumed(fit, *columns):
    """Train without interruption, and with a kill after the first checkpoint; the logged columns must be equal.

    Returns:
        Last checkpoints of the uninterrupted run, of the killed run, and of the resumed run.
    """
    whole, killed = (["--trainer.default_root_dir", root] for root in ("whole", "killed"))
    assert main([*fit, *whole]) == 0
    run = Path("killed/fit-1")
    kill_when_there_is(run / "checkpoints/last.ckpt", *fit, *killed)
    interrupted = last(run)
    assert not (run / "weights.safetensors").exists()
    assert main([*fit, *killed, "--ckpt_path", "last"]) == 0
    assert metrics(Path("whole/fit-1"), *columns) == metrics(run, *columns)
    return last(Path("whole/fit-1")), interrupted, last(run)


def last(run):
    """Load the last checkpoint of a run."""
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def rows(path):
    """Read the rows of a CSV file."""
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def metrics(run, *columns):
    """Read the rows of a run's metrics in which one of the columns is filled."""
    table = [{name: row.get(name) for name in ("epoch", "step", *columns)} for row in rows(run / "metrics.csv")]
    return [row for row in table if any(row[name] for name in columns)]


def differing(first, second):
    """Return the names of tensors that differ between two nested mappings."""
    names = []
    for name, value in first.items():
        if isinstance(value, dict):
            names += [f"{name}.{inner}" for inner in differing(value, second[name])]
        elif isinstance(value, torch.Tensor) and not torch.equal(value, second[name]):
            names.append(str(name))
    return names
