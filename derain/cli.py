"""The ``derain`` command: one line a command, nothing heavy imported until one is chosen."""

import importlib
import io
import logging
import os
import sys

import derain
from derain.errors import DerainError, Stopped
from derain.interrupts import interruptible
from derain.options import CommandParser
from derain.warning_limit import few_warnings

TRAINER = {
    "fit": "train a method: derain fit --config experiments/rain100h.yaml",
    "validate": "judge a method on its validation images",
    "test": "judge a method on test images: per-image CSV, summary JSON, one table",
    "predict": "restore the images of a data set, sharded over devices",
}
COMMANDS = {
    "restore": "remove rain from photos and videos: derain restore rainy.jpg clean.jpg",
    "app": "a page that restores photos, in the browser on this machine",
    "models": "the weights that have a name: derain models list",
    "score": "judge any method's result folder: derain score DERAINED CLEAN",
    "data": "list, verify and synthesize data sets",
    "route": "tell which of CLIP-RPN's routes images take: derain route Rain800 --prompts 3",
    "caption": "captions of clean images, for DA-CLIP: derain caption RainTrainH captions.tsv",
    "export": "a method as ONNX or torch.export, checked: derain export --weights W --format onnx OUT",
    "table": "the papers' tables from results of derain test: derain table RESULTS...",
    "bench": "parameters, multiplications and time of every method",
    "doctor": "versions, devices, caches and weights found here",
}


def usage() -> str:
    """All commands, one line each."""
    commands = "\n".join(f"  {name:<10}{told}" for name, told in (TRAINER | COMMANDS).items())
    return f"""derain {derain.__version__}: single-image rain removal

usage: derain COMMAND [options]     (derain COMMAND --help tells the options)

{commands}

  --version print the version"""


def _tell() -> None:
    """Send log messages to standard error, once and from one rank; print characters that cannot be encoded escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    log = logging.getLogger("derain")
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    log.handlers = log.handlers or [logging.StreamHandler()]


def command_first(arguments: list[str]) -> list[str]:
    """Move configurations that are given before a trainer command behind it: ``--config x.yaml fit`` is usual too.

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
        given = " ".join(arguments)
        raise DerainError(f"{given}: no command; write it first, as derain fit {given}")
    return [arguments[end], *arguments[:end], *arguments[end + 1 :]]


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; bad input gives one line and code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    _tell()
    if command in {"-h", "--help", "help"}:
        print(usage())
        return 0
    if command == "--version":
        print(derain.__version__)
        return 0
    try:
        arguments = command_first(arguments)
        command = arguments[0]
        if command in TRAINER:
            from derain.commands import train

            with few_warnings(logging.getLogger("derain")):
                return train.run(arguments)
        if command not in COMMANDS:
            raise DerainError(f"no command {command!r}; known are {', '.join(TRAINER | COMMANDS)}")
        module = importlib.import_module(f"derain.commands.{command}")
        parser = CommandParser(f"derain {command}", description=module.__doc__)
        module.add_arguments(parser)
        with interruptible(), few_warnings(logging.getLogger("derain")):
            return int(module.run(parser.parse_args(arguments[1:])))
    except KeyboardInterrupt as interrupt:
        stop = interrupt if isinstance(interrupt, Stopped) else Stopped("interrupted")
        print(f"derain: {stop}", file=sys.stderr)
        return stop.code
    except BrokenPipeError:  # the reader of our output, `head` for example, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DerainError, OSError) as error:  # OSError: a disk that is full, a folder that may not be written
        # A DataLoader's worker puts its traceback before the line.
        print(f"derain: error: {str(error).rpartition('derain.errors.DerainError: ')[2].strip()}", file=sys.stderr)
        return 2
