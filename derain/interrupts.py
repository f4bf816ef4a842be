"""Stopping of a command by Ctrl-C or another signal: an exception is raised, so that temporary files are removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from derain.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end. By default, SIGTERM and SIGHUP end it without removing temporary files."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Stopped` at the first signal of ``SIGNALS`` within the block; ignore further ones until the block ends.

    Signals that the process already ignores, such as SIGHUP under ``nohup``, stay ignored. Only the main thread can
    handle signals; on other threads, the block runs unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for handled in handlers:  # a second signal would interrupt the removal of temporary files
            signal.signal(handled, signal.SIG_IGN)
        reason = "" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
        raise Stopped(f"interrupted{reason}", number)

    current = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in current.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
