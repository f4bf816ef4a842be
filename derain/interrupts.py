"""Ending a command early, by Ctrl-C or a signal, with its temporary files removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a process without a traceback, and without removing its temporary files."""


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C's asked the process to end.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` for ``SIGNALS`` within the block, so that it ends as by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code by which shells know a signal, 130 for Ctrl-C.

    Example:
        >>> exit_code(KeyboardInterrupt()), exit_code(Interrupted(signal.SIGTERM))
        (130, 143)
    """
    return 128 + (interrupt.number if isinstance(interrupt, Interrupted) else int(signal.SIGINT))
