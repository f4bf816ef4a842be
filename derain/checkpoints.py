"""Atomic writing of checkpoints: a process that is killed leaves no incomplete file under the final name."""

import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from derain.images import write_whole

UNFINISHED = re.compile(r"\.[0-9a-f]{8}-.+")
"""Names of the temporary files of `derain.images.write_whole`."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes to a temporary file beside the target, then renames it.

    Lightning's own uses the system's temporary folder. If that is on a different file system, renaming copies the file,
    and a process that is killed meanwhile leaves half a file in place of the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint; on a remote file system, as Lightning does."""
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
        age: Minimum time since a file was written, in seconds; newer files may belong to a running process.
    """
    for path in list(folder.rglob(".*")):
        try:
            if UNFINISHED.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime >= age:
                path.unlink()
        except FileNotFoundError:  # renamed or removed by another process meanwhile
            continue
