"""Checkpoints that are written whole or not at all, even if the process is killed."""

import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from derain.images import write_whole

UNFINISHED = re.compile(r"\.[0-9a-f]{8}-.+")
"""Names of the files that `derain.images.write_whole` writes."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file beside its target, then rename it.

    Lightning's own writes to the folder for temporary files, which may be another file system: a rename from there is
    a copy, and a kill meanwhile leaves half a file in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint; one on a remote file system is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with write_whole(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def remove_unfinished(folder: Path, age: float = 0.0) -> None:
    """Remove unfinished files of killed processes below a folder.

    Args:
        folder: Folder of a run or of several.
        age: Seconds for which files have not been written; younger ones may belong to a process that still runs.
    """
    for path in list(folder.rglob(".*")):
        try:
            if UNFINISHED.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime >= age:
                path.unlink()
        except FileNotFoundError:  # another process has just renamed or removed it
            continue
