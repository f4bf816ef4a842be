"""Folders of runs, such as ``ROOT/COMMAND-N``; all processes of a run share one folder."""

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from derain.errors import DerainError

RUN = re.compile(r"(fit|validate|test|predict)-[\d.]+")
"""Pattern of the names of run folders, such as ``fit-3`` or, in SLURM jobs, ``fit-1234.1``."""


def root_of(folder: Path) -> Path:
    """Return the folder in which new runs are numbered: the parent of a run folder, or else the folder itself.

    Thus, if ``--trainer.default_root_dir`` is the folder of an earlier run, a new run gets a folder beside it.
    """
    return folder.parent if RUN.fullmatch(folder.name) and (folder / "config.yaml").is_file() else folder


def shared_folder(root: Path, command: str, resuming: bool, arguments: Sequence[str] = ()) -> Path:
    """Return the folder of the run, the same for all its processes.

    The folder of a run to resume is found by `run_folder`. That of a new run is chosen as follows:

    - under torchrun, rank 0 chooses it and sends it to the others through torchrun's store;
    - under SLURM with several tasks, it is named after the job and, except in step 0, the step;
    - under SLURM with one task, see `job_folder`;
    - otherwise, it gets the next free number.

    Processes that Lightning has started read the folder from the environment variable ``DERAIN_RUN``.

    Args:
        root: Folder in which runs are numbered, or a run folder.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        resuming: Whether to resume a run, as for `run_folder`.
        arguments: The command line, by which a job that SLURM has restarted finds its run.

    Raises:
        DerainError: If there is no run to resume.
    """
    variables = os.environ
    by_torchrun = "TORCHELASTIC_RUN_ID" in variables
    by_slurm = _slurm_tasks() > 1
    if resuming and (by_torchrun or by_slurm):
        return run_folder(root, command, resuming)
    if by_torchrun:
        store = TCPStore(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False)
        key = f"derain-{variables['TORCHELASTIC_RESTART_COUNT']}"
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            store.set(key, str(_choose_folder(root, command, resuming=False, arguments=arguments)))
        folder = Path(store.get(key).decode())
        folder.mkdir(parents=True, exist_ok=True)  # nodes may not share a disk
        return folder
    if by_slurm:
        step = variables.get("SLURM_STEP_ID", "0")
        suffix = "" if step == "0" else f".{step}"
        folder = root_of(root) / f"{command}-{variables['SLURM_JOB_ID']}{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if variables.get("LOCAL_RANK", "0") != "0":
        return Path(variables["DERAIN_RUN"])
    folder = _choose_folder(root, command, resuming, arguments)
    variables["DERAIN_RUN"] = str(folder)
    return folder


def restarts() -> int:
    """Return how often SLURM has restarted the job of this process; 0 outside SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _slurm_tasks() -> int:
    """Return the number of processes that SLURM started for this run; 1 in an interactive shell or outside SLURM."""
    # Lightning recognises an interactive shell by these names of the job.
    interactive = os.environ.get("SLURM_JOB_NAME") in {"bash", "interactive"}
    return 1 if interactive else int(os.environ.get("SLURM_NTASKS", 1))


def _choose_folder(root: Path, command: str, resuming: bool, arguments: Sequence[str]) -> Path:
    """Return the folder of the run; called by one process of the run."""
    if resuming or "SLURM_JOB_ID" not in os.environ:
        return run_folder(root, command, resuming)
    return job_folder(root_of(root), command, arguments)


def job_folder(root: Path, command: str, arguments: Sequence[str]) -> Path:
    """Return the folder of a run in a SLURM job: ``root/COMMAND-JOBID``, with ``.1``, ``.2`` for further runs.

    If SLURM has restarted the job, a run gets the folder in which it saved the same command line before. After each
    start of the job, it saves the command line to a new file in the folder, ``slurm-RESTARTS.txt``. Only one process
    can create the file, so that two runs never use a folder at the same time.

    Args:
        root: Folder for the run folders.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: The command line.
    """
    command_line = shlex.join(arguments)
    name = f"{command}-{os.environ['SLURM_JOB_ID']}"
    suffixes = itertools.count(1)
    folder = root / name
    while not _claim(folder, command_line):
        folder = root / f"{name}.{next(suffixes)}"
    return folder


def _claim(folder: Path, command_line: str) -> bool:
    """Create or reuse the folder of a run in a SLURM job; return False if it belongs to another run."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if command_line not in [file.read_text() for file in folder.glob("slurm-*.txt")]:
            return False
    try:
        with (folder / f"slurm-{restarts()}.txt").open("x") as record:
            record.write(command_line)
    except FileExistsError:  # another run with the same command line has claimed the folder since this start of the job
        return False
    return True


def run_folder(root: Path, command: str, resuming: bool) -> Path:
    """Create the folder of a new run, or return the folder of the run to resume.

    Args:
        root: Folder in which runs are numbered, or a run folder.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        resuming: Whether to resume a run: that in ``root`` if it has a ``last.ckpt``, or else that with the newest
            ``last.ckpt``.

    Raises:
        DerainError: If there is no run to resume.
    """
    if not resuming:
        return _new_folder(root_of(root), command)
    if (root / "checkpoints" / "last.ckpt").is_file():
        return root
    root = root_of(root)
    checkpoints = list(root.glob(f"{command}-*/checkpoints/last.ckpt"))
    if not checkpoints:
        raise DerainError(
            f"--ckpt_path last: no {command}-N/checkpoints/last.ckpt in {root}; omit the option to start a new run"
        )
    newest = max(checkpoints, key=lambda file: file.stat().st_mtime)
    return newest.parents[1]


def _new_folder(root: Path, command: str) -> Path:
    """Create the folder whose number is one above the largest, and return it."""
    numbers = [path.name.rsplit("-", 1)[1] for path in root.glob(f"{command}-*")]
    number = max((int(number) for number in numbers if number.isdecimal()), default=0)
    while True:
        number += 1
        folder = root / f"{command}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run has just created it
            continue
        return folder
