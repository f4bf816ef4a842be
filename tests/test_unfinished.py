import os
import subprocess
import sys
from pathlib import Path

import pytest

from derain.images import write_whole
from derain.unfinished import remove_unfinished_outputs, temporary_path

KILLED = """
import os, signal, sys
from pathlib import Path
from derain.images import write_whole

with write_whole(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["out.mp4", "x" * 120 + ".png"])
def test_files_of_killed_processes_are_removed_and_reported(tmp_path, caplog, name):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    target = tmp_path / name
    process = subprocess.run([sys.executable, "-c", KILLED, str(target)], env=environment, check=False)
    assert process.returncode < 0
    (left,) = tmp_path.iterdir()
    remove_unfinished_outputs([target])
    assert not left.exists()
    assert str(left) in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="the file is not locked, but open files cannot be removed")
def test_files_that_are_being_written_are_kept(tmp_path, caplog):
    target = tmp_path / "out.mp4"
    with write_whole(target) as temporary:
        temporary.write_bytes(b"new")
        remove_unfinished_outputs([target])
        assert temporary.exists()
        assert str(temporary) in caplog.text
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_other_files_are_kept(tmp_path, caplog):
    target = tmp_path / "out.mp4"
    others = [
        target,
        tmp_path / ".hidden-out.mp4",
        temporary_path(tmp_path / "other.mp4"),
        tmp_path / "0123abcd-out.mp4",
    ]
    for path in others:
        path.write_bytes(b"")
    remove_unfinished_outputs([target, tmp_path / "missing" / "out.mp4"])
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert not caplog.text
