"""Checkpoints that are written atomically: if the process is killed, no incomplete file has the final name."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from derain.images import write_whole
from derain.unfinished import UNFINISHED


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes to a temporary file beside the target, then renames it.

    `TorchCheckpointIO` writes to the system's temporary folder. If that is on another file system, the file is copied
    instead of renamed, and a process that is killed meanwhile replaces the previous checkpoint with a partial file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint atomically; paths with ``://``, such as ``s3://…``, are left to `TorchCheckpointIO`."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with write_whole(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def remove_unfinished(folder: Path, age: float = 0.0) -> None:
    """Remove temporary files that killed processes left in a folder and its subfolders.

    Args:
        folder: Folder of one or several runs.
        age: Minimum number of seconds since a file was last written; a running process may be writing younger files.
    """
    for path in list(folder.rglob(".*")):
        try:
            if UNFINISHED.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime >= age:
                path.unlink()
        except FileNotFoundError:  # another process has renamed or removed it
            continue
