"""Ranks of a run on one machine: if one dies, the others end within 30 seconds, and one of them reports it.

Under torchrun and SLURM, their own agents end the other ranks. Otherwise, Lightning starts the other ranks as child
processes of rank 0. Rank 0 observes its children; except on Windows, they observe rank 0.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from derain.errors import DerainError, Stopped

MAIN_PROCESS = "DERAIN_MAIN_PROCESS"
"""Environment variable by which rank 0 passes its process ID to the ranks that it starts."""

INTERVAL = 1.0
"""Seconds between two checks of the other ranks."""

PATIENCE = 12.0
"""Seconds in which a rank may end by itself after another rank has died."""

TERMINATED = {128 + signal.SIGTERM, -signal.SIGTERM}
"""Exit codes of a rank that ended after SIGTERM: derain's own, and that of a rank without a handler of the signal."""

LOST_CONNECTION = re.compile("gloo|nccl|ucc|tcpstore|process ?group|connection|socket|broken pipe", re.IGNORECASE)
"""Pattern of the errors that torch.distributed raises if another rank has died."""


class SignalConnector(_SignalConnector):
    """Lightning's signal handlers without communication between ranks.

    Lightning's handler of SIGTERM broadcasts the signal. If one rank broadcasts while another waits in a collective
    operation of the run, they wait for each other forever.
    """

    def _sigterm_notifier_fn(self, signum: int, _: FrameType) -> None:
        """Note the signal, and send it to the ranks that this one has started."""
        if self.received_sigterm:
            return
        self.received_sigterm = True
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)


class Ranks:
    """Context manager of a run: rank 0 observes the ranks that Lightning has started, and these observe rank 0.

    The started ranks begin to observe when the object is created. With one process, or under torchrun and SLURM, there
    is nothing to observe.

    Args:
        next_step: Returns the end of the message about a dead rank, such as how to resume the run.
    """

    def __init__(self, next_step: Callable[[], str]) -> None:
        self.next_step = next_step
        self.processes: Sequence[subprocess.Popen[bytes]] = ()
        self._finished = threading.Event()
        self.local_rank = os.environ.get("LOCAL_RANK", "0")
        self.rank_0_id = 0  # process ID of rank 0; 0 on rank 0 itself, and if rank 0 is not observed
        if self.local_rank == "0":
            os.environ[MAIN_PROCESS] = str(os.getpid())
        elif os.name == "posix":
            self.rank_0_id = int(os.environ.get(MAIN_PROCESS, 0))  # not set by torchrun or SLURM
        if self.rank_0_id:
            threading.Thread(target=self._watch, daemon=True).start()
        # Lightning's own observer kills rank 0 too, without a message and with the exit code of a signal.
        subprocess_script._launch_process_observer = self.observe  # type: ignore[assignment,attr-defined]

    def observe(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Observe the ranks that rank 0 has started."""
        self.processes = processes
        threading.Thread(target=self._watch, daemon=True).start()

    def failure(self) -> str:
        """Return which observed rank has died and how; empty if none has."""
        if self.rank_0_id:
            return "" if os.getppid() == self.rank_0_id else f"rank 0 (process {self.rank_0_id}) ended"
        for rank, process in enumerate(self.processes, 1):
            code = process.poll()
            if code:
                reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"rank {rank} (process {process.pid}) {reason}"
        return ""

    def __enter__(self) -> None:
        """Begin the run."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Stop observing; if the run has failed, end the ranks that this one has started.

        If an observed rank has died, an exception about a lost connection is replaced by one of the following.

        Raises:
            DerainError: On rank 0, or on rank 1 if rank 0 has died; the message names the dead rank.
            Stopped: On rank 0, if SIGTERM has stopped another rank.
            SystemExit: On ranks above 1, if rank 0 has died; these ranks print no message.
        """
        try:
            if error is not None:
                self._explain(error)
        finally:
            if error is not None:
                self._wait(lambda: all(process.poll() is not None for process in self.processes))
                self._kill()
            self._finished.set()

    def _explain(self, error: BaseException) -> None:
        """Raise the exceptions of `__exit__` if ``error`` is about a lost connection and an observed rank has died."""
        if not (self.rank_0_id or self.processes) or not LOST_CONNECTION.search(f"{type(error).__name__} {error}"):
            return
        self._wait(lambda: self.failure() != "")  # a connection is lost before the process has ended
        failure = self.failure()
        if any(process.poll() in TERMINATED for process in self.processes):
            raise Stopped(f"terminated{self.next_step()}", signal.SIGTERM) from error
        if failure and self._reports:
            raise DerainError(f"{failure}{self.next_step()}") from error
        if failure:
            raise SystemExit(2) from error

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true, for at most half of `PATIENCE`."""
        end = time.monotonic() + PATIENCE / 2
        while not condition() and time.monotonic() < end:
            time.sleep(INTERVAL / 10)

    @property
    def _reports(self) -> bool:
        """Whether this rank reports a dead rank: rank 0 reports others, rank 1 reports rank 0."""
        return self.local_rank in {"0", "1"}

    def _kill(self) -> None:
        """End the ranks that this one has started."""
        for process in self.processes:
            process.kill()  # a process that waits for a collective ignores SIGTERM

    def _watch(self) -> None:
        """End this process and its children if an observed rank has died and the run does not end in time."""
        while not self._finished.wait(INTERVAL):
            failure = self.failure()
            if failure and not self._finished.wait(PATIENCE):
                if self._reports:
                    print(f"derain: error: {failure}{self.next_step()}", file=sys.stderr, flush=True)
                self._kill()
                os._exit(2)
