"""Limit on warnings that repeat for many files: the first ones are shown, the others are counted."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 5
"""Number of warnings of one kind that are shown."""


class WarningLimit(logging.Filter):
    """Logging filter that shows the first ``SHOWN`` warnings of a kind and counts all.

    Warnings are of the same kind if they share a format string that starts with ``"%s: "``, for the name of a file.
    Warnings with other format strings are all shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a log record."""
        kind = record.msg
        if record.levelno != logging.WARNING or not isinstance(kind, str) or not kind.startswith("%s: "):
            return True
        self.counts[kind] += 1
        return self.counts[kind] <= SHOWN

    def totals(self) -> list[str]:
        """Return one line with the count for each kind of which warnings were hidden.

        Example:
            >>> limit = WarningLimit()
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
def limited_warnings(log: logging.Logger) -> Iterator[None]:
    """Limit the warnings of a logger within the block; at its end, log the count of each kind that was cut."""
    limit = WarningLimit()
    log.addFilter(limit)
    try:
        yield
    finally:
        log.removeFilter(limit)
        for line in limit.totals():
            log.warning(line)
