"""The ``derain`` command; imports only what the chosen command needs."""

import importlib
import io
import logging
import os
import sys

import derain
from derain.errors import ArgumentError, DerainError, Stopped
from derain.interrupts import interruptible
from derain.warning_limit import few_warnings

TRAINER = {
    "fit": "train a method: derain fit --config experiments/rain100h.yaml",
    "validate": "score a method on validation images",
    "test": "score a method on test images: per-image CSV, summary JSON, a table",
    "predict": "restore the images of a data set, on one or several devices",
}
"""Commands of LightningCLI."""

COMMANDS = {
    "restore": "remove rain from photos and videos: derain restore rainy.jpg clean.jpg",
    "app": "serve a page that restores photos, in the browser on this machine",
    "models": "list the bundled models: derain models list",
    "score": "score the results of any method: derain score DERAINED CLEAN",
    "data": "list, verify and synthesize data sets",
    "route": "count which routes of CLIP-RPN images take: derain route Rain800 --prompts 3",
    "caption": "caption clean images for DA-CLIP: derain caption RainTrainH captions.tsv",
    "export": "export a method as ONNX or with torch.export: derain export derain.onnx --weights W",
    "table": "tables as in papers, from results of derain test: derain table RESULTS...",
    "bench": "count parameters and multiplications, and time methods",
    "doctor": "report versions, devices, caches and weights",
}
"""Commands with a module of the same name in ``derain.commands``."""


def usage() -> str:
    """Return the help text with one line a command."""
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in (TRAINER | COMMANDS).items())
    return f"""derain {derain.__version__}: single-image rain removal

usage: derain COMMAND [options]     (derain COMMAND --help lists the options)

{commands}

  --version print the version"""


def set_up_output() -> None:
    """Send log messages of one rank to standard error, and escape characters that a stream cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    variables = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    rank = next((os.environ[name] for name in variables if name in os.environ), "0")
    log = logging.getLogger("derain")
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def command_first(arguments: list[str]) -> list[str]:
    """Move ``--config`` options that precede the command behind it.

    Raises:
        DerainError: If no command follows them.

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
        raise DerainError(f"{options}: no command; write it first, as derain fit {options}")
    return [arguments[end], *arguments[:end], *arguments[end + 1 :]]


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        DerainError: If there is no such command, or it refuses its input.
    """
    command, *options = command_first(arguments)
    if command in TRAINER:
        from derain.commands import train

        with few_warnings(logging.getLogger("derain")):
            return train.run([command, *options])
    if command not in COMMANDS:
        raise DerainError(f"no command {command!r}; choose {', '.join(TRAINER | COMMANDS)}")
    from derain.options import run_command

    module = importlib.import_module(f"derain.commands.{command}")
    with interruptible(), few_warnings(logging.getLogger("derain")):
        return run_command(f"derain {command}", module, options)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit code: 2 after bad input, which prints one line.

    Args:
        argv: Arguments after ``derain``; those of the process by default.
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
    except BrokenPipeError:  # such as of head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DerainError, OSError) as error:  # OSError: a full disk, a folder without permission
        # The workers of a DataLoader put their traceback before the message.
        message = str(error).rpartition("derain.errors.DerainError: ")[2].strip()
        prefix = "--" if isinstance(error, ArgumentError) else ""
        print(f"derain: error: {prefix}{message}", file=sys.stderr)
        return 2
