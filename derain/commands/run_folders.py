"""Folders of runs: ``ROOT/COMMAND-N``, one for all processes of a run."""

import itertools
import os
import re
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


def shared_folder(root: Path, command: str, resuming: bool) -> Path:
    """Return the folder of the run, the same for all its processes.

    Processes of torchrun learn it from rank 0 through torchrun's store, those of SLURM have the id of their job in
    common, and those that Lightning starts find it in the environment.
    """
    variables = os.environ
    by_torchrun, by_slurm = "TORCHELASTIC_RUN_ID" in variables, int(variables.get("SLURM_NTASKS", 1)) > 1
    if resuming and (by_torchrun or by_slurm):
        return run_folder(root, command, resuming)
    if by_torchrun:
        store = TCPStore(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False)
        key = f"derain-{variables['TORCHELASTIC_RESTART_COUNT']}"
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            store.set(key, str(run_folder(root, command, resuming)))
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
    folder = run_folder(root, command, resuming)
    variables["DERAIN_RUN"] = str(folder)
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
