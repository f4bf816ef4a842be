"""Programs in processes that are forked from one with all imports, which saves seconds per process."""

import atexit
import multiprocessing
import multiprocessing.reduction
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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


def _run(program, arguments, environment, working_directory, output):
    """Become the program."""
    file = output.detach()
    for stream in (1, 2):
        os.dup2(file, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(working_directory)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [program[-1], *arguments]
    try:
        if program[0] == "-m":
            sys.path.insert(0, working_directory)
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing omits them
