"""The ``derain`` command; imports only what the chosen command needs."""

import importlib
import io
import logging
import os
import sys

import derain
from derain.errors import ArgumentError, DerainError, Stopped
from derain.interrupts import interruptible
from derain.warning_limit import limited_warnings

TRAINER_COMMANDS = {
    "fit": "train a method: derain fit --config experiments/rain100h.yaml",
    "validate": "score a method on validation images",
    "test": "score a method on test images: per-image CSV, summary JSON, a table",
    "predict": "restore the images of a data set, on one or several devices",
}
"""Commands that LightningCLI runs, and their summaries."""

COMMANDS = {
    "restore": "remove rain from photos and videos: derain restore rainy.jpg clean.jpg",
    "app": "serve a web page on this machine that restores photos",
    "models": "list models that are loaded by name: derain models list",
    "score": "score the results of any method: derain score DERAINED CLEAN",
    "data": "list, fetch, verify and synthesize data sets",
    "route": "count the images on each route of CLIP-RPN: derain route Rain800 --prompts 3",
    "caption": "caption clean images for DA-CLIP: derain caption RainTrainH captions.tsv",
    "export": "export a method as ONNX or with torch.export: derain export derain.onnx --weights FILE",
    "table": "build the papers' tables from results of derain test: derain table RESULTS...",
    "bench": "count parameters and multiplications, and time methods",
    "doctor": "report versions, devices, caches and weights",
}
"""Commands with a module of the same name in ``derain.commands``, and their summaries."""


def usage() -> str:
    """Return the help text: one line per command."""
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in (TRAINER_COMMANDS | COMMANDS).items())
    return f"""derain {derain.__version__}: single-image rain removal

usage: derain COMMAND [options]     (derain COMMAND --help lists the options)

{commands}

  --version print the version"""


def set_up_output() -> None:
    """Send log messages to standard error, and escape characters that a stream cannot encode.

    In distributed training, processes of ranks above 0 log only warnings and errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may contain any bytes
    variables = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    rank = next((os.environ[name] for name in variables if name in os.environ), "0")
    log = logging.getLogger("derain")
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def command_first(arguments: list[str]) -> list[str]:
    """Move options ``--config`` and ``-c`` from before the command to after it.

    Raises:
        DerainError: If no command follows these options.

    Example:
        >>> command_first(["--config", "x.yaml", "fit", "--data.crop", "64"])
        ['fit', '--config', 'x.yaml', '--data.crop', '64']
    """
    end = 0
    while end < len(arguments) and arguments[end].partition("=")[0] in {"-c", "--config"}:
        end += 1 if "=" in arguments[end] else 2
    if end == 0:
        return arguments
    if end >= len(arguments):
        options = " ".join(arguments)
        raise DerainError(f"{options}: no command; expected one before the options, as in: derain fit {options}")
    return [arguments[end], *arguments[:end], *arguments[end + 1 :]]


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        DerainError: If there is no such command, or its input is invalid.
    """
    from derain.memory import keep_freed_memory

    keep_freed_memory()  # before a command imports modules that create tensors
    command, *options = command_first(arguments)
    if command in TRAINER_COMMANDS:
        from derain.commands import train

        with limited_warnings(logging.getLogger("derain")):
            return train.run([command, *options])
    if command not in COMMANDS:
        raise DerainError(f"{command}: no such command; choose {', '.join(TRAINER_COMMANDS | COMMANDS)}")
    from derain.options import run_command

    module = importlib.import_module(f"derain.commands.{command}")
    with interruptible(), limited_warnings(logging.getLogger("derain")):
        return run_command(f"derain {command}", module, options)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and report errors in one line on standard error.

    Args:
        argv: Arguments after ``derain``; by default those of the process.

    Returns:
        Exit code: that of the command; 2 after a DerainError or OSError; 128 plus the number of the signal after an
        interrupt; 0 if the reader of the output has ended.
    """
    arguments = sys.argv[1:] if argv is None else argv
    set_up_output()
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(derain.__version__)
        return 0
    try:
        return run(arguments)
    except KeyboardInterrupt as interrupt:
        stop = interrupt if isinstance(interrupt, Stopped) else Stopped("interrupted")
        print(f"derain: {stop}", file=sys.stderr)
        return stop.code
    except BrokenPipeError:  # the reader of a pipe has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DerainError, OSError) as error:  # OSError: a full disk, a folder without permission
        # Errors of DataLoader workers contain a traceback before the message.
        message = str(error).rpartition("derain.errors.DerainError: ")[2].strip()
        prefix = "--" if isinstance(error, ArgumentError) else ""
        print(f"derain: error: {prefix}{message}", file=sys.stderr)
        return 2
