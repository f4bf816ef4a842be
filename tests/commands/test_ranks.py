"""If one of two ranks dies, the other ends within half a minute and says so in one line; so do both at SIGTERM."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from derain.methods import PReNetModule
from tests.factories import make_set
from tests.runs import EXPERIMENT, start

LIMIT = 30
"""Seconds within which all processes must have ended."""

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from derain.cli import main
from derain.methods import PReNetModule

step = PReNetModule.training_step

def die(self, batch, batch_idx):
    Path(f"pid-{{self.global_rank}}").write_text(str(os.getpid()))
    if batch_idx == 2 and self.global_rank == {rank}:
        Path("died").touch()
        {death}
    if batch_idx == 2 and {hangs}:
        time.sleep(600)  # as in a collective of NCCL, which does not notice
    return step(self, batch, batch_idx)

PReNetModule.training_step = die
sys.exit(main(sys.argv[1:]))
"""

WAITING = """
import os, sys, time
from pathlib import Path
from derain.cli import main
from derain.methods import PReNetModule

step = PReNetModule.validation_step

def wait(self, batch, batch_idx):
    Path(f"pid-{self.global_rank}").write_text(str(os.getpid()))
    if self.global_rank == 1 and batch_idx == 0:
        time.sleep(5)  # rank 0 evaluates its images, and waits for the scores of rank 1
    elif self.global_rank == 0 and batch_idx == 1:
        Path("waiting").touch()
    return step(self, batch, batch_idx)

PReNetModule.validation_step = wait
sys.exit(main(sys.argv[1:]))
"""


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for_both(process, file):
    """Wait until a script has written a file; return the process IDs of its ranks."""
    while not Path(file).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    return [int(Path(f"pid-{rank}").read_text()) for rank in range(2)]


def assert_both_end(pids):
    """Wait until all processes have ended; kill them if they do not end in time."""
    begin = time.monotonic()
    try:
        while any(map(is_running, pids)) and time.monotonic() < begin + LIMIT:
            time.sleep(0.1)
        assert not any(map(is_running, pids))
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """Write ``exp.yaml``: a run of two processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DERAIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    make_set(tmp_path / "data", "Rain800", "train", count=16)
    make_set(tmp_path / "data", "Rain800", "test", count=4)
    config = EXPERIMENT | {"data": EXPERIMENT["data"] | {"val": "none", "batch_size": 2}}
    config["trainer"] = EXPERIMENT["trainer"] | {"devices": 2, "strategy": "ddp", "limit_train_batches": 4}
    Path("exp.yaml").write_text(yaml.safe_dump(config))
    PReNetModule(stages=1).save_weights(Path("w.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "fresh"),
    [
        (["validate", "--weights", "w.safetensors"], False),
        (["fit", "--trainer.num_sanity_val_steps", "2"], True),  # Lightning itself starts Python for rank 1
    ],
)
def test_both_ranks_end_if_both_are_terminated(two_ranks, arguments, fresh):
    """In an evaluation, rank 0 waits for rank 1 when both receive the signal."""
    Path("waiting.py").write_text(WAITING)
    process = start(*arguments, "--config", "exp.yaml", "--data.val", "Rain800", program=("waiting.py",), fresh=fresh)
    pids = wait_for_both(process, "waiting")
    time.sleep(1)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert_both_end(pids)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "death", "reason", "hangs"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", False),
        (1, "os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", True),
        (1, "os._exit(3)", "exit code 3", True),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", "rank 0", False),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", "rank 0", True),
    ],
)
def test_the_others_end_if_a_rank_dies(two_ranks, rank, death, reason, hangs):
    Path("ranks.py").write_text(SCRIPT.format(rank=rank, death=death, hangs=hangs))
    process = start("fit", "--config", "exp.yaml", program=("ranks.py",))
    assert_both_end(wait_for_both(process, "died"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (2 if rank == 1 else -signal.SIGKILL)
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if "derain: error: " in line)
    assert reason in line
