"""Few lines for a warning that concerns many files: the first are shown, the others are counted."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 5
"""Warnings of one kind that are shown."""


class Limit(logging.Filter):
    """Let the first warnings of a kind pass, and count all of them.

    A kind are the warnings that begin with the name of a file and differ in their arguments only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a message."""
        kind = record.msg
        if record.levelno != logging.WARNING or not isinstance(kind, str) or not kind.startswith("%s: "):
            return True
        self.counts[kind] += 1
        return self.counts[kind] <= SHOWN

    def totals(self) -> list[str]:
        """Return a line for each kind that was not shown in full.

        Example:
            >>> limit = Limit()
            >>> records = [logging.makeLogRecord({"levelno": 30, "msg": "%s: is blue", "args": ("a",)})] * 7
            >>> [limit.filter(record) for record in records].count(True), limit.totals()
            (5, ['7 files in all, the first 5 above: is blue'])
        """
        return [
            f"{count} files in all, the first {SHOWN} above: {kind.removeprefix('%s: ')}".replace("%s", "…")
            for kind, count in self.counts.items()
            if count > SHOWN
        ]


@contextmanager
def few_warnings(log: logging.Logger) -> Iterator[None]:
    """Limit the warnings of a kind within the block, and log how many there were at its end."""
    limit = Limit()
    log.addFilter(limit)
    try:
        yield
    finally:
        log.removeFilter(limit)
        for line in limit.totals():
            log.warning(line)
