import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from derain.checkpoints import WholeCheckpointIO, remove_unfinished
from derain.images import write_whole

KILLED = """
import os, pickle, signal, sys, torch
from derain.checkpoints import WholeCheckpointIO
class Deadly(dict):
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)
io = WholeCheckpointIO()
io.save_checkpoint({"step": 1, "weights": torch.ones(1000)}, "last.ckpt")
io.save_checkpoint({"step": 2, "weights": torch.ones(1000), "deadly": Deadly()}, "last.ckpt")
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": "/dev/shm"}
    process = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=False)
    assert process.returncode < 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_written_beside_its_target(tmp_path, monkeypatch):
    seen = []
    kept = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: (seen.append(Path(file.name).parent), kept(content, file)))
    WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "new" / "last.ckpt")
    assert seen == [tmp_path / "new"]
    assert WholeCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt", weights_only=True) == {"step": 1}


def test_only_old_leftovers_are_removed(tmp_path):
    kept = [tmp_path / "weights.safetensors", tmp_path / ".hidden", tmp_path / ".git-keep"]
    for path in kept:
        path.write_text("")
    with write_whole(tmp_path / "run" / "last.ckpt") as temporary:
        temporary.write_text("being written")
        remove_unfinished(tmp_path, age=60.0)
        assert temporary.exists()
        old = temporary.with_name(".0123abcd-last.ckpt")
        old.write_text("")
        os.utime(old, (time.time() - 61,) * 2)
        remove_unfinished(tmp_path, age=60.0)
        assert not old.exists()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / "run" / "last.ckpt"}
