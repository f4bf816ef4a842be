"""Programs in processes that are forked from one with all imports, which saves seconds per process.

If Lightning starts a second rank in such a process, that rank is a fork too: a process in reserve, which is forked
before the program begins and whose parent is rank 0.
"""

import atexit
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only
from lightning.pytorch.strategies.launchers import subprocess_script

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.imports"])


class ForkedCommand:
    """A program in a forked process; has what tests use of `subprocess.Popen`.

    Standard output and error are written to one file, so that the process never waits for a reader.
    """

    def __init__(self, program, arguments, environment):
        self._output = tempfile.TemporaryFile(mode="a+", errors="replace")  # noqa: SIM115 - for the object's lifetime
        working_directory = os.getcwd()  # noqa: PTH109 - as text
        file = multiprocessing.reduction.DupFd(self._output.fileno())
        command = (program, list(map(str, arguments)))
        self._process = CONTEXT.Process(target=_run, args=(*command, environment, working_directory, file))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """Exit code; None while the process runs."""
        return self._process.exitcode

    def poll(self):
        """Return the exit code; None while the process runs."""
        return self.returncode

    def wait(self, timeout=None):
        """Wait for the end; return the exit code."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("derain", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the end; return the output and None."""
        self.wait(timeout)
        return self.stdout.read(), None

    def kill(self):
        """Send SIGKILL."""
        self._process.kill()

    def terminate(self):
        """Send SIGTERM."""
        self._process.terminate()

    def send_signal(self, number):
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self):
        """The output so far, from its beginning."""
        self._output.seek(0)
        return self._output


class SecondRank:
    """The process in reserve, as a rank that Lightning starts; has what Lightning and derain use of `subprocess.Popen`.

    Args:
        pid: Process in reserve.
        pipe: File descriptor of the pipe that it waits at.
        command: Command of the rank: Python, and its arguments.
        env: Environment variables of the rank.
        cwd: Ignored: the rank runs in the folder of rank 0.
    """

    def __init__(self, pid, pipe, command, env, cwd):
        self.pid, self.returncode, self._lock = pid, None, threading.Lock()
        with os.fdopen(pipe, "wb") as file:
            pickle.dump((command[1:], dict(env)), file)

    def poll(self):
        """Return the exit code; None while the process runs."""
        with self._lock:  # derain waits in several threads
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(program, arguments, environment, working_directory, output):
    """Become the program, or the second rank that it starts."""
    file = output.detach()
    for stream in (1, 2):
        os.dup2(file, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(working_directory)
    sys.path.insert(0, working_directory)
    waiting, sending = os.pipe()
    reserve = os.fork()
    if reserve:
        os.close(waiting)
        subprocess_script.subprocess = SimpleNamespace(Popen=partial(SecondRank, reserve, sending))
        _become(program, arguments, environment)
        return
    os.close(sending)
    with os.fdopen(waiting, "rb") as file:
        command = file.read()
    if command:  # else rank 0 has ended, and needed no second rank
        arguments, environment = pickle.loads(command)
        length = 2 if arguments[0] == "-m" else 1
        _become(arguments[:length], arguments[length:], environment)


def read_rank():
    """Let Lightning read the rank from the environment of this process: it did so when it was imported."""
    rank_zero_only.rank = _get_rank() or 0


def _become(program, arguments, environment):
    """Run a module (``-m NAME``) or a script with an environment."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may differ
    read_rank()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [program[-1], *arguments]
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing omits them
