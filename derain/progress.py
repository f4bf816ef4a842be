"""Progress bars of long loops and of downloads."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield the items, and show a progress bar if standard error is a terminal.

    Args:
        items: Items to iterate over.
        label: Text before the bar.
        total: Number of items.

    Example:
        >>> list(track([1, 2], "Counting", 2))
        [1, 2]
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _bar(*columns) as progress:
        yield from progress.track(items, total=total, description=label)


@contextmanager
def track_bytes(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds a number of bytes to a progress bar, which is shown if standard error is a terminal.

    The function may be called from several threads.

    Args:
        label: Text before the bar.
        total: Total number of bytes, including ``done``; 0 if unknown.
        done: Number of bytes from earlier runs, which do not count for the speed.

    Example:
        >>> with track_bytes("Fetching", 100, done=40) as advance:
        ...     advance(60)
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _bar(*columns) as progress:
        task = progress.add_task(label, total=total or None, completed=done)

        def advance(size: int) -> None:
            progress.advance(task, size)

        yield advance


def _bar(*columns: ProgressColumn) -> Progress:
    """Return a progress bar that is shown on standard error if that is a terminal, and removed at the end."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
