"""Folders of runs: ``ROOT/COMMAND-N``, one for all processes of a run."""

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
"""Names of folders of runs."""


def root_of(folder: Path) -> Path:
    """Return the folder that new runs are numbered in.

    A run that is configured by an earlier run's ``config.yaml`` gets a folder beside that run, not inside it.
    """
    return folder.parent if RUN.fullmatch(folder.name) and (folder / "config.yaml").is_file() else folder


def shared_folder(root: Path, command: str, resuming: bool, arguments: Sequence[str] = ()) -> Path:
    """Return the folder of the run, the same for all its processes.

    Processes of torchrun learn it from rank 0 through torchrun's store, those of SLURM have the id of their job in
    common, and those that Lightning starts find it in the environment.

    Args:
        root: Folder of runs.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        resuming: Whether the newest run is resumed.
        arguments: The command line, by which a job that SLURM restarts recognises its run.
    """
    variables = os.environ
    by_torchrun, by_slurm = "TORCHELASTIC_RUN_ID" in variables, _tasks_of_slurm() > 1
    if resuming and (by_torchrun or by_slurm):
        return run_folder(root, command, resuming)
    if by_torchrun:
        store = TCPStore(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False)
        key = f"derain-{variables['TORCHELASTIC_RESTART_COUNT']}"
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            store.set(key, str(_own_folder(root, command, resuming, arguments)))
        folder = Path(store.get(key).decode())
        folder.mkdir(parents=True, exist_ok=True)  # nodes may have disks of their own
        return folder
    if by_slurm:
        step = variables.get("SLURM_STEP_ID", "0")
        folder = root_of(root) / f"{command}-{variables['SLURM_JOB_ID']}{'' if step == '0' else f'.{step}'}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if variables.get("LOCAL_RANK", "0") != "0":
        return Path(variables["DERAIN_RUN"])
    folder = _own_folder(root, command, resuming, arguments)
    variables["DERAIN_RUN"] = str(folder)
    return folder


def restarts() -> int:
    """Return how often SLURM has restarted the job of this process; 0 outside SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _tasks_of_slurm() -> int:
    """Return the number of processes that SLURM started for this run; 1 in a shell of an allocation."""
    # The names by which Lightning recognises a shell.
    interactive = os.environ.get("SLURM_JOB_NAME") in {"bash", "interactive"}
    return 1 if interactive else int(os.environ.get("SLURM_NTASKS", 1))


def _own_folder(root: Path, command: str, resuming: bool, arguments: Sequence[str]) -> Path:
    """Return the folder of a run whose folder one process chooses."""
    if resuming or "SLURM_JOB_ID" not in os.environ:
        return run_folder(root, command, resuming)
    return job_folder(root_of(root), command, arguments)


def job_folder(root: Path, command: str, arguments: Sequence[str]) -> Path:
    """Return the folder of a run in a SLURM job: ``root/COMMAND-JOBID``, with ``.1``, ``.2`` for further runs.

    A restarted job returns to the folder of the run that had the same command line. Each attempt records its command
    line in the folder, in a file that one process alone can create, so that no two runs share a folder.
    """
    command_line = shlex.join(arguments)
    names = itertools.chain([""], (f".{index}" for index in itertools.count(1)))
    while True:
        folder = root / f"{command}-{os.environ['SLURM_JOB_ID']}{next(names)}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if command_line not in [file.read_text() for file in folder.glob("slurm-*.txt")]:
                continue
        try:
            with (folder / f"slurm-{restarts()}.txt").open("x") as record:
                record.write(command_line)
        except FileExistsError:  # another run of this attempt has the same command line
            continue
        return folder


def run_folder(root: Path, command: str, resuming: bool) -> Path:
    """Return a new folder ``root/COMMAND-N``, created at once so that no other run takes it, or the last one to resume.

    Where ``root`` is itself the folder of a run, that run is resumed.

    Raises:
        DerainError: If there is nothing to resume.
    """
    if resuming and (root / "checkpoints" / "last.ckpt").is_file():
        return root
    root = root_of(root)
    runs = list(root.glob(f"{command}-*"))
    numbered = [int(number) for path in runs if (number := path.name.rsplit("-", 1)[1]).isdecimal()]
    if not resuming:
        for free in itertools.count(max(numbered, default=0) + 1):
            folder = root / f"{command}-{free}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:  # another run has just taken it
                continue
            return folder
    files = [path / "checkpoints" / "last.ckpt" for path in runs]
    saved = {file: file.stat().st_mtime for file in files if file.is_file()}
    if not saved:
        raise DerainError(f"--ckpt_path last: no {command}-N/checkpoints/last.ckpt in {root}; start without it")
    return max(saved, key=lambda file: saved[file]).parents[1]
