"""Ending a command early, by Ctrl-C or a signal, with its temporary files removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from derain.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end. Without a handler, the last two end it without removing its temporary files."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Stopped` for the first of ``SIGNALS`` within the block; further ones are ignored until it ends.

    Signals that the process ignores already, as ``nohup`` makes it ignore a hang-up, stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:  # another signal would interrupt the removal of temporary files
            signal.signal(other, signal.SIG_IGN)
        reason = "" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
        raise Stopped(f"interrupted{reason}", number)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
